"""The library under each of JAX's debugging switches: `pytest -m switches`.

A switch that changes no arithmetic changes no number here; one that changes the random numbers leaves shapes, dtypes
and exact statistics as they are. All of them work as context managers. The rest of the suite runs under strict dtype
and rank promotion, so JAX's defaults, which users have, are two of the cases.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax._src import config as jax_config  # jax.config has these as settings, and not all as context managers
from jax.sharding import AxisType

from nfjax import augment, cost, initializers, optim, resnet, spp, steps
from nfjax.initializers import gains

pytestmark = pytest.mark.switches

IMAGES = np.random.default_rng(0).integers(0, 256, (len(augment.OPERATIONS), 8, 8, 3)).astype(np.uint8)
FLOATS = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@contextlib.contextmanager
def explicit_sharding():
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))):
        yield


EXACT = {
    "enable_x64": lambda: jax.enable_x64(True),
    "disable_jit": jax.disable_jit,
    "check_tracer_leaks": jax.checking_leaks,
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "enable_checks": lambda: jax_config.enable_checks(True),
    "debug_key_reuse": lambda: jax.debug_key_reuse(True),
    "numpy_dtype_promotion=standard": lambda: jax.numpy_dtype_promotion("standard"),
    "numpy_rank_promotion=allow": lambda: jax.numpy_rank_promotion("allow"),
    "default_matmul_precision=highest": lambda: jax.default_matmul_precision("highest"),
    "explicit_sharding": explicit_sharding,
}
OTHER_NUMBERS = {
    "default_prng_impl=rbg": lambda: jax_config.default_prng_impl("rbg"),
    "default_prng_impl=unsafe_rbg": lambda: jax_config.default_prng_impl("unsafe_rbg"),
    "threefry_partitionable=false": lambda: jax.threefry_partitionable(False),
}


def network(norm=None, remat=False):
    return resnet.PreActResNet(10, "convshort", norm, width=2, image_size=8, remat=remat, rngs=nnx.Rngs(0))


class Round(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return x + linen.Dense(3, name="branch")(linen.relu(linen.Dense(3)(x))), None


class Scanned(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.scan(Round, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()(x, None)[0]


def kernels():
    gains._gain.cache_clear()
    foreign = initializers.standardize(jax.nn.initializers.uniform(), variance=2.0)
    key = jax.random.key(0)
    drawn = {name: init(key, (3, 3, 4, 8)) for name, init in initializers.INITIALIZERS.items()}
    traced = jax.jit(lambda key: foreign(key, (4, 8)))(key)
    return drawn, foreign(key, (4, 8)), traced, [vars(initializers.gain(name)) for name in ("relu", "gelu")]


def gradients():
    model = network("batch")
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return jnp.square(nnx.merge(graph, params, rest)(jnp.asarray(FLOATS))).mean()

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params))


def signal():
    of = [
        spp.propagate(network(remat=True), FLOATS, loss="cross_entropy"),
        spp.propagate(Scanned(), FLOATS[:, 0, 0], where=Round),
        spp.propagate_seeds(lambda seed: Scanned(), spp.noise((4, 3)), seeds=2, where=Round),
    ]
    return [(p.forward_var, p.backward_var, p.branch_var) for p in of], spp.predict(network(), FLOATS.shape).forward_var


def costs():
    return [
        np.array(list(vars(cost.count(*call)).values())) for call in ((network(), (1, 8, 8, 3)), (Scanned(), (1, 3)))
    ]


def operations():
    names = list(augment.OPERATIONS)
    keys = jax.random.split(jax.random.key(0), 2)
    images = [augment.apply(IMAGES, names, 9, interpolation=way) for way in ("nearest", "bilinear")]
    apply = jax.jit(lambda images, magnitudes: augment.apply(images, names, magnitudes))
    return images, apply(IMAGES, np.full(len(names), 20, np.int32)), augment.rand_augment(keys[0], IMAGES)


def others():
    keys = jax.random.split(jax.random.key(0), 6)
    floats = augment.normalize(IMAGES, MEAN, STD)
    return (
        augment.random_crop(keys[0], IMAGES, 2),
        augment.random_flip(keys[1], IMAGES),
        augment.random_erasing(keys[2], IMAGES, value=(1, 2, 3)),
        augment.random_erasing(keys[3], floats, value="random"),
        augment.mixup(keys[4], floats, 0.4),
        augment.cutmix(keys[5], floats, 0.4, jnp.ones(len(IMAGES), jnp.float32)),
    )


def training_step():
    model, params, batch_stats = steps.as_functions(network())
    schedule = optim.warmed_up(optim.cosine_by_epoch(0.1, [2, 4]), 1)
    optimizer = optim.sgd(schedule, 0.9, 1e-4, 1.0, 0.01)

    def preprocess(key, images):
        return augment.normalize(augment.random_flip(key, images), MEAN, STD)

    def mix(key, images, mask):
        return augment.mixup(key, images, 0.4, mask)

    step = jax.jit(steps.make_train_step(model, optimizer, preprocess, jax.random.key(1), 0.1, mix, accumulate=2))
    batch = {"image": IMAGES[:4], "label": np.arange(4, dtype=np.int32), "mask": np.ones(4, np.float32)}
    state, sums = step(steps.initial_state(params, batch_stats, optimizer), batch | {"step": np.int32(0)})
    evaluate = jax.jit(steps.make_eval_step(model, lambda images: augment.normalize(images, MEAN, STD)))
    return state, sums, evaluate(state, batch)


PARTS = (kernels, gradients, signal, costs, operations, others, training_step)


@pytest.fixture(scope="module")
def results():
    """What each part gives without a switch, computed once."""
    found = {}

    def of(part):
        if part not in found:
            found[part] = jax.tree.map(np.asarray, part())
        return found[part]

    return of


@pytest.fixture(autouse=True)
def _two_blocks(monkeypatch):
    monkeypatch.setitem(resnet.STAGES, 10, (resnet.BasicBlock, (1, 1)))


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
@pytest.mark.parametrize("switch", EXACT)
def test_a_switch_changes_no_number(switch, part, results):
    expected = results(part)
    with EXACT[switch]():
        given = jax.tree.map(np.asarray, part())
    jax.tree.map(equal, given, expected)


def equal(given, expected):
    assert given.dtype == expected.dtype
    size = float(np.abs(expected.astype(np.float64)).max(initial=0))
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
@pytest.mark.parametrize("switch", OTHER_NUMBERS)
def test_other_random_numbers_are_as_good(switch, part, results):
    expected = results(part)
    with OTHER_NUMBERS[switch]():
        given = jax.tree.map(np.asarray, part())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), given) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(given))
    if part is kernels:
        for name, kernel in given[0].items():
            assert kernel.var(dtype=np.float64) == pytest.approx(expected[0][name].var(dtype=np.float64), rel=1e-5)
            assert abs(kernel.mean(dtype=np.float64)) < 1e-7
    if part is costs:
        jax.tree.map(np.testing.assert_array_equal, given, expected)

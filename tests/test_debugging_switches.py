"""The library under each of JAX's debugging switches: `pytest -m switches`.

A switch that changes no arithmetic changes no number here; one that changes the random numbers leaves shapes, dtypes
and exact statistics as they are. All of them work as context managers. The rest of the suite runs under strict dtype
and rank promotion, so JAX's default, which users have, is one of the cases. Not here: debug_key_reuse, because a
training step derives its keys from (seed, step), and splits and folds the same one; and a training step under a mesh
of the caller's, because it has its own.
"""

import contextlib
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax._src import config as jax_config  # jax.config has these as settings, and not all as context managers
from jax.sharding import AxisType

from nfjax import augment, cost, initializers, resnet, spp
from nfjax.initializers import _gains
from nfjax.training import optimizers, schedules, step
from nfjax.training.networks import as_functions
from nfjax.training.state import Batch, TrainState

pytestmark = pytest.mark.switches

IMAGES = np.random.default_rng(0).integers(0, 256, (len(augment.OPERATIONS), 8, 8, 3)).astype(np.uint8)
FLOATS = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@contextlib.contextmanager
def explicit_sharding():
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))):
        yield


@contextlib.contextmanager
def checking_leaks():
    """Behind each trace JAX collects garbage and looks through all objects: here through those made from now on, which
    are the ones that can have leaked.
    """
    gc.collect()
    gc.freeze()
    try:
        with jax.checking_leaks():
            yield
    finally:
        gc.unfreeze()


def network(norm=None, remat=False):
    one = {"stage_sizes": (1,), "block": "basic", "image_size": 8, "remat": remat}
    return resnet.PreActResNet(None, "convshort", norm, width=2, **one, rngs=nnx.Rngs(0))


class Round(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return x + linen.Dense(3, name="branch")(linen.relu(linen.Dense(3)(x))), None


class Scanned(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.scan(Round, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()(x, None)[0]


def kernels():
    _gains._gain.cache_clear()
    foreign = initializers.standardize(jax.nn.initializers.uniform(), variance=2.0)
    drawn = {name: init(jax.random.key(0), (3, 3, 4, 8)) for name, init in initializers.INITIALIZERS.items()}
    traced = jax.jit(lambda key: foreign(key, (4, 8)))(jax.random.key(0))
    return (
        drawn,
        foreign(jax.random.key(0), (4, 8)),
        traced,
        [vars(initializers.gain(name)) for name in ("relu", "gelu")],
    )


def signal():
    of = [
        spp.propagate(network(remat=True), FLOATS, where=resnet.Block, loss="cross_entropy"),
        spp.propagate_seeds(lambda seed: Scanned(), spp.noise((4, 3)), seeds=1, where=Round),
    ]
    return [(p.forward_var, p.backward_var, p.branch_var) for p in of]


def costs():
    found = [cost.count(*call) for call in ((network(), (1, 8, 8, 3)), (Scanned(), (1, 3)))]
    return [np.array([one.parameters, one.norm_parameters, one.macs]) for one in found]


def operations():
    names = list(augment.OPERATIONS)
    apply = jax.jit(lambda images, way: augment.apply(images, names, 9, interpolation=way), static_argnums=1)
    return [apply(IMAGES, way) for way in ("nearest", "bilinear")], augment.choose(jax.random.key(0), 4, 2)


@jax.jit
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
    model, params, batch_stats = as_functions(network("batch"))
    optimizer = optimizers.make("sgd", schedules.cosine_by_epoch(0.1, [2, 4]), momentum=0.9, weight_decay=1e-4)

    def preprocess(key, images):
        return augment.normalize(augment.random_flip(key, images), MEAN, STD)

    task = step.Task(model, optimizer, preprocess, label_smoothing=0.1)
    batch = Batch(IMAGES[:4], np.arange(4, dtype=np.int32), np.ones(4, np.float32))
    return step.train_step(TrainState.start(params, batch_stats, optimizer), batch, jax.random.key(1), task=task)


ALL = (kernels, signal, costs, operations, others, training_step)
RANDOM = (kernels, signal, others, training_step)
EXACT = {
    "enable_x64": (lambda: jax.enable_x64(True), ALL),
    "disable_jit": (jax.disable_jit, ALL),
    "check_tracer_leaks": (checking_leaks, ALL),
    "debug_nans": (lambda: jax.debug_nans(True), ALL),
    "debug_infs": (lambda: jax.debug_infs(True), ALL),
    "enable_checks": (lambda: jax_config.enable_checks(True), ALL),
    "numpy_dtype_promotion=standard": (lambda: jax.numpy_dtype_promotion("standard"), (operations, *RANDOM)),
    "default_matmul_precision=highest": (lambda: jax.default_matmul_precision("highest"), (training_step,)),
    "explicit_sharding": (explicit_sharding, (kernels, signal, operations)),
}
OTHER_NUMBERS = {
    "default_prng_impl=rbg": (lambda: jax_config.default_prng_impl("rbg"), RANDOM),
    "threefry_partitionable=false": (lambda: jax.threefry_partitionable(False), (kernels, signal)),
}


def cases(switches):
    return [
        pytest.param(switch, part, id=f"{name}-{part.__name__}")
        for name, (switch, parts) in switches.items()
        for part in parts
    ]


@pytest.fixture(scope="module")
def results():
    """What each part gives without a switch, computed once."""
    found = {}

    def of(part):
        if part not in found:
            found[part] = jax.tree.map(np.asarray, part())
        return found[part]

    return of


@pytest.mark.parametrize(("switch", "part"), cases(EXACT))
def test_a_switch_changes_no_number(switch, part, results):
    expected = results(part)
    with switch():
        given = jax.tree.map(np.asarray, part())
    jax.tree.map(equal, given, expected)


def equal(given, expected):
    assert given.dtype == expected.dtype
    size = float(np.abs(expected.astype(np.float64)).max(initial=0))
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize(("switch", "part"), cases(OTHER_NUMBERS))
def test_other_random_numbers_are_as_good(switch, part, results):
    expected = results(part)
    with switch():
        given = jax.tree.map(np.asarray, part())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), given) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(given))
    if part is kernels:
        for name, kernel in given[0].items():
            if name == "delta_orthogonal":  # of which the sum of squares is known, and not the mean
                squares = [(drawn.astype(np.float64) ** 2).sum() for drawn in (kernel, expected[0][name])]
                assert squares[0] == pytest.approx(squares[1], rel=1e-5)
                continue
            assert kernel.var(dtype=np.float64) == pytest.approx(expected[0][name].var(dtype=np.float64), rel=1e-5)
            assert abs(kernel.mean(dtype=np.float64)) < 1e-7

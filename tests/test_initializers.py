import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from nfjax import initializers, resnet
from nfjax.initializers import INITIALIZERS, effective_taps, gain

SHAPES = [(64, 32), (200_000, 4), (5, 8, 16), (3, 3, 16, 32), (1, 1, 64, 16), (3, 3, 3, 4, 8), (3, 3, 128, 256)]


def moments(kernel, axis=None):
    kernel = np.asarray(kernel, np.float64)
    return kernel.mean(axis), kernel.var(axis)


STANDARDIZED = [name for name in INITIALIZERS if name != "delta_orthogonal"]


def wanted_variance(name, shape):
    taps, c_in, c_out = math.prod(shape[:-2]), shape[-2], shape[-1]
    return {
        "he_fan_in": 2 / (taps * c_in),
        "he_fan_out": 2 / (taps * c_out),
        "brock": 2 / (1 - 1 / math.pi) / (taps * c_in),
        "he_effective_fan_out": 2 / (taps * c_out),  # without strides and borders
    }[name]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", STANDARDIZED)
def test_mean_is_zero_and_variance_exact(name, shape):
    kernel = INITIALIZERS[name](jax.random.key(0), shape)
    assert kernel.shape == shape
    assert kernel.dtype == jnp.float32
    mean, variance = moments(kernel)
    std = math.sqrt(wanted_variance(name, shape))
    assert abs(mean) < 1e-7 * std
    assert variance == pytest.approx(std**2, rel=1e-6)
    if name == "brock":
        mean, variance = moments(kernel, tuple(range(len(shape) - 1)))
        np.testing.assert_allclose(mean, 0, atol=2e-7 * std)
        np.testing.assert_allclose(variance, std**2, rtol=2e-6)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_traced_equals_eager(name):
    init, key, shape = INITIALIZERS[name], jax.random.key(3), (3, 3, 96, 128)  # more than one block of the stream
    eager = init(key, shape)
    std = float(np.std(eager))
    np.testing.assert_allclose(jax.jit(init, static_argnums=1)(key, shape), eager, atol=1e-6 * std)
    keys = jax.random.split(key, 3)
    batch = jax.vmap(lambda k: init(k, shape))(keys)
    np.testing.assert_allclose(batch[1], init(keys[1], shape), atol=1e-6 * std)
    abstract = jax.eval_shape(lambda k: init(k, shape, jnp.bfloat16), key)
    assert (abstract.shape, abstract.dtype) == (shape, jnp.bfloat16)


def test_traced_surroundings_of_a_concrete_key():
    key, shape = jax.random.key(3), (64, 2000)
    inside = jax.jit(lambda x: x + INITIALIZERS["brock"](key, shape))(jnp.zeros(shape))
    np.testing.assert_allclose(inside, INITIALIZERS["brock"](key, shape), atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.5, float("nan")])
def test_constant_and_broken_draws_are_refused(value):
    init = initializers.standardize(jax.nn.initializers.constant(value), variance=1.0)
    with pytest.raises(ValueError, match="it is constant, or not finite"):
        init(jax.random.key(0), (4, 4))


def test_stream_is_the_documented_one():
    key, shape = jax.random.key(5), (3, 3, 96, 128)
    blocks = [jax.random.normal(jax.random.fold_in(key, i), (2**16,)) for i in range(2)]
    expected = np.concatenate(blocks)[: math.prod(shape)].reshape(shape) * math.sqrt(2 / (9 * 96))
    np.testing.assert_allclose(initializers.he_normal("fan_in")(key, shape), expected, rtol=1e-6)


def test_many_blocks_at_once_continue_the_stream():
    key = jax.random.key(6)
    small, large = (initializers.he_normal()(key, (n, 1024)) * math.sqrt(n) for n in (1000, 1100))
    np.testing.assert_allclose(large[:1000], small, rtol=1e-6)  # 16 and 17 blocks of 2**16, and 16 as singles


def test_old_style_keys_work():
    kernel = INITIALIZERS["he_fan_out"](jax.random.PRNGKey(0), (16, 16))
    assert float(kernel.var()) == pytest.approx(2 / 16, rel=1e-6)


def test_he_normal_is_untruncated():
    kernel = initializers.he_normal("fan_in")(jax.random.key(0), (1000, 1000))
    assert float(jnp.abs(kernel).max()) > 4.2 * math.sqrt(2 / 1000)  # a truncated normal stops at 2 standard deviations
    _, variance = moments(kernel)
    assert variance == pytest.approx(2 / 1000, rel=0.01)


def test_bfloat16_statistics_are_exact_before_the_cast():
    init, key, shape = INITIALIZERS["he_fan_out"], jax.random.key(1), (3, 3, 64, 64)
    np.testing.assert_array_equal(init(key, shape, jnp.bfloat16), init(key, shape).astype(jnp.bfloat16))


@pytest.mark.parametrize("per", ["kernel", "channel"])
def test_standardize_foreign_initializer(per):
    init = initializers.standardize(jax.nn.initializers.uniform(3.0), per, variance=lambda shape: 7 / shape[-1])
    for kernel in (init(jax.random.key(0), (30, 50)), jax.jit(lambda k: init(k, (30, 50)))(jax.random.key(0))):
        mean, variance = moments(kernel, 0 if per == "channel" else None)
        np.testing.assert_allclose(mean, 0, atol=1e-7)
        np.testing.assert_allclose(variance, 7 / 50, rtol=2e-6)
    with pytest.raises(ValueError, match="variance="):
        initializers.standardize(jax.nn.initializers.uniform(3.0))


def test_standardize_leaves_the_wrapped_array_alone():
    for source in (
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.arange(12).reshape(3, 4),
        jnp.arange(12.0).reshape(3, 4),
    ):
        init = initializers.standardize(lambda key, shape, dtype, source=source: source, variance=1.0)
        assert float(init(jax.random.key(0), (3, 4)).var()) == pytest.approx(1.0, rel=1e-6)
        np.testing.assert_array_equal(source, np.arange(12).reshape(3, 4))


def test_standardizing_twice_is_standardizing_once():
    init = initializers.he_effective_fan_out()
    assert initializers.standardize(init) is init  # and keeps its geometry
    again = initializers.standardize(INITIALIZERS["brock"], per="kernel")
    assert float(again(jax.random.key(0), (8, 8)).var()) == pytest.approx(2 / (1 - 1 / math.pi) / 8, rel=1e-6)


def test_in_flax_and_plain_jax():
    init = initializers.standardize(initializers.he_normal("fan_out"))
    conv = nnx.Conv(4, 8, (3, 3), kernel_init=init, rngs=nnx.Rngs(0))
    dense = linen.Dense(8, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    assert float(conv.kernel[...].var()) == pytest.approx(2 / 72, rel=1e-6)
    assert float(dense["kernel"].var()) == pytest.approx(2 / 8, rel=1e-6)
    assert float(init(jax.random.key(0), (4, 8)).var()) == pytest.approx(2 / 8, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: INITIALIZERS["he_fan_out"](jax.random.key(0), (1, 1)), "one element"),
        (lambda: INITIALIZERS["brock"](jax.random.key(0), (1, 8)), "one element"),
        (lambda: INITIALIZERS["he_fan_in"](jax.random.key(0), (8,)), "rank 2"),
        (lambda: INITIALIZERS["he_fan_in"](jax.random.key(0), (0, 8)), "no empty axis"),
        (lambda: initializers.he_normal("fan_avg"), "unknown mode 'fan_avg'.*fan_in.*fan_out"),
        (lambda: initializers.standardize(initializers.he_normal(), per="row"), "unknown per='row'"),
        (lambda: initializers.standardize(initializers.he_normal(), variance=-1.0), "finite and positive"),
        (lambda: initializers.get("he_fan_ot"), "unknown init 'he_fan_ot'.*brock"),
        (lambda: initializers.gain("swoosh"), "unknown activation 'swoosh'.*relu"),
        (lambda: initializers.gain(lambda x: x * 0), "no finite gain"),
        (lambda: effective_taps((3, 3), padding="FULL", spatial_size=8), "unknown padding 'FULL'"),
        (lambda: effective_taps((3, 3), padding="VALID", spatial_size=2), "does not fit"),
        (lambda: effective_taps((3, 3), stride=(1, 2, 3), spatial_size=8), "3 entries"),
        (lambda: effective_taps((3, 3), stride=0), "must be positive"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_relu_gain_in_closed_form_agrees_with_quadrature():
    exact, quadrature = gain("relu"), gain(lambda x: jnp.maximum(x, 0))
    assert exact == initializers.Gain(2.0, 2.0, 2 / (1 - 1 / math.pi))
    for name in ("forward", "backward", "channel"):
        assert getattr(quadrature, name) == pytest.approx(getattr(exact, name), rel=1e-6)


@pytest.mark.parametrize("name", initializers.ACTIVATIONS)
def test_gains_against_sampling(name):
    z = jax.random.normal(jax.random.key(0), (1_000_000,))
    value = np.asarray(initializers.ACTIVATIONS[name](z), np.float64)
    slope = np.asarray(jax.vmap(jax.grad(initializers.ACTIVATIONS[name]))(z), np.float64)
    gains = gain(name)
    assert gains.forward * (value**2).mean() == pytest.approx(1, rel=0.01)
    assert gains.backward * (slope**2).mean() == pytest.approx(1, rel=0.01)
    assert gains.channel * value.var() == pytest.approx(1, rel=0.01)


def test_gain_under_jit():
    kernel = jax.jit(lambda key: initializers.he_normal("fan_in", jax.nn.gelu)(key, (64, 64)))(jax.random.key(0))
    assert float(kernel.var()) == pytest.approx(gain("gelu").forward / 64, rel=0.1)


def counted_taps(window, stride, padding, size):
    """The mean number of outputs that an input position feeds: a convolution with ones of every unit impulse."""
    impulses = jnp.eye(size * size).reshape(-1, size, size, 1)
    dimensions = ("NHWC", "HWIO", "NHWC")
    ones = jnp.ones((*window, 1, 1))
    fed = jax.lax.conv_general_dilated(impulses, ones, (stride, stride), padding, dimension_numbers=dimensions)
    return float(fed.sum() / size**2)


@pytest.mark.parametrize("size", [4, 7, 8])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 1), (1, 1)), ((0, 2), (1, 0))])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("window", [(1, 1), (3, 3), (3, 2)])
def test_effective_taps_against_a_convolution(window, stride, padding, size):
    assert effective_taps(window, stride, padding, size) == pytest.approx(
        counted_taps(window, stride, padding, size), rel=1e-6
    )


def test_effective_taps_by_hand():
    assert effective_taps((3, 3), 1, 1, 32) == pytest.approx(
        (94 / 32) ** 2
    )  # the border loses 2 of 96 taps on each axis
    assert effective_taps((3, 3), 2, "CIRCULAR", 8) == pytest.approx(9 / 4)
    assert effective_taps((3, 3), 2) == pytest.approx(9 / 4)
    assert effective_taps((3,), 1, "SAME", 4) == pytest.approx(10 / 4)
    assert effective_taps(()) == 1


def test_effective_fan_out_variance():
    init = initializers.he_effective_fan_out(stride=2, padding=1, spatial_size=32)
    kernel = init(jax.random.key(0), (3, 3, 16, 32))
    assert float(kernel.var()) == pytest.approx(2 / (32 * effective_taps((3, 3), 2, 1, 32)), rel=1e-6)
    bound = initializers.at_layer(INITIALIZERS["he_effective_fan_out"], 2, 1, 32)
    np.testing.assert_array_equal(bound(jax.random.key(0), (3, 3, 16, 32)), kernel)
    assert initializers.at_layer(INITIALIZERS["brock"], 2, 1, 32) is INITIALIZERS["brock"]


# ---------------------------------------------------------------- wrong arguments


def returns_a_list(key, shape, dtype):
    return [0.0]


@pytest.mark.parametrize(
    "init",
    [
        jax.nn.initializers.he_normal,
        jax.nn.initializers.variance_scaling,
        jax.nn.initializers.orthogonal,
        jax.nn.initializers.constant,
        nnx.initializers.lecun_normal,
        initializers.he_normal,
        initializers.brock_normal,
        initializers.he_effective_fan_out,
        returns_a_list,
        lambda key: jnp.zeros((3, 3, 2, 2)),
        jax.nn.relu,
    ],
    ids=lambda init: init.__name__,
)
def test_initializers_that_were_not_called(init):
    for accept in (
        initializers.get,
        lambda init: initializers.standardize(init, variance=1.0),
        lambda init: resnet.PreActResNet(18, init=init, width=2, rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(ValueError, match=r"init=.*(was it not called|draws a kernel by \(key, shape, dtype\))"):
            accept(init)


def test_initializers_of_any_origin_are_accepted():
    def only_dense(key, shape, dtype):
        assert len(shape) == 2
        return jax.random.normal(key, shape, dtype)

    class Callable:
        def __call__(self, key, shape, dtype=jnp.float32, out_sharding=None):
            return jax.random.normal(key, shape, dtype)

    known = (jax.nn.initializers.zeros, jax.nn.initializers.he_normal(), nnx.initializers.normal(0.1))
    for init in (*known, only_dense, Callable(), lambda *args: np.ones(args[1], np.float32)):
        assert initializers.get(init) is init
        initializers.standardize(init, variance=1.0)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, int, bool, jnp.complex64, np.dtype("int64"), "int16"])
def test_dtypes_that_hold_no_kernel(dtype):
    for init in (*INITIALIZERS.values(), initializers.he_normal()):
        with pytest.raises(
            ValueError, match="cannot hold a kernel, whose weights are fractions: expected a floating-p"
        ):
            init(jax.random.key(0), (3, 3, 4, 8), dtype)
    for good in (None, jnp.float16, jnp.bfloat16, np.float32, "float32", float):
        assert jnp.issubdtype(INITIALIZERS["he_fan_out"](jax.random.key(0), (4, 8), good).dtype, jnp.floating)


def test_a_draw_of_another_shape_and_a_variance_that_is_none():
    other = initializers.standardize(lambda key, shape, dtype: jnp.arange(6.0).reshape(2, 3), variance=1.0)
    with pytest.raises(ValueError, match=r"drew an array of shape \(2, 3\): expected an array of shape \(4, 4\)"):
        other(jax.random.key(0), (4, 4))
    for variance in (-1.0, 0.0, math.nan, math.inf):
        init = initializers.standardize(jax.nn.initializers.normal(), variance=lambda shape, v=variance: v)
        with pytest.raises(ValueError, match=r"of a kernel of shape \(4, 4\) must be finite and positive"):
            init(jax.random.key(0), (4, 4))


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize("groups", [1, 4, 64])
@pytest.mark.parametrize("factory", [initializers.he_normal, initializers.he_effective_fan_out])
def test_grouped_convolutions_keep_the_gradients_variance(factory, groups):
    """Behind a ReLU half of the gradient passes: He's fan-out has the variance 2 on the way back to its input."""
    mode = {"mode": "fan_out"} if factory is initializers.he_normal else {"padding": "CIRCULAR"}
    init = initializers.standardize(factory(**mode, feature_group_count=groups))
    conv = nnx.Conv(
        64, 128, (3, 3), padding="CIRCULAR", feature_group_count=groups, use_bias=False, kernel_init=init,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    assert conv.kernel.shape == (3, 3, 64 // groups, 128)
    assert float(conv.kernel[...].var()) == pytest.approx(2 / (9 * 128 / groups), rel=1e-6)
    x, gradient = (
        jax.random.normal(key, (8, 8, 8, n))
        for key, n in zip(jax.random.split(jax.random.key(1)), (64, 128), strict=True)
    )
    _, pull = jax.vjp(conv, x)
    assert float(pull(gradient)[0].var()) == pytest.approx(2, rel=0.06)


@pytest.mark.parametrize("groups", [1, 4, 64])
def test_grouped_convolutions_keep_the_signals_second_moment(groups):
    for init in (INITIALIZERS["he_fan_in"], initializers.he_normal("fan_in", feature_group_count=groups)):
        conv = nnx.Conv(
            64, 128, (3, 3), padding="CIRCULAR", feature_group_count=groups, use_bias=False, kernel_init=init,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        x = jax.nn.relu(jax.random.normal(jax.random.key(1), (8, 8, 8, 64)))
        assert float(jnp.square(conv(x)).mean()) == pytest.approx(1, rel=0.1)


def test_depthwise_without_being_told_is_too_small():
    told, not_told = initializers.he_normal("fan_out", feature_group_count=64), initializers.he_normal("fan_out")
    assert told.variance((3, 3, 1, 64)) == pytest.approx(2 / 9)
    assert not_told.variance((3, 3, 1, 64)) == pytest.approx(2 / 576)


def test_channels_on_other_axes():
    ours = initializers.he_normal("fan_in", "linear", in_axis=-1, out_axis=-2)
    assert ours.variance((3, 3, 16, 32)) == pytest.approx(1 / (9 * 32))
    theirs = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)
    kernel = theirs(jax.random.key(0), (3, 3, 64, 128))
    assert float(kernel.var()) == pytest.approx(ours.variance((3, 3, 64, 128)), rel=0.05)
    init = initializers.standardize(initializers.he_normal("fan_out", in_axis=-1, out_axis=-2))
    conv = nnx.ConvTranspose(
        32, 64, (3, 3), padding="CIRCULAR", transpose_kernel=True, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0)
    )
    _, pull = jax.vjp(conv, jax.random.normal(jax.random.key(1), (8, 8, 8, 32)))
    gradient = pull(jax.random.normal(jax.random.key(2), (8, 8, 8, 64)))[0]
    assert float(gradient.var()) == pytest.approx(2, rel=0.06)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: initializers.he_normal("fan_out", feature_group_count=3)(jax.random.key(0), (3, 3, 1, 64)), "divide"),
        (lambda: initializers.he_effective_fan_out(feature_group_count=5).variance((3, 3, 1, 64)), "does not divide"),
        (lambda: initializers.he_normal(feature_group_count=0), "feature_group_count=0 must be a positive integer"),
        (lambda: initializers.he_normal(feature_group_count=2.0), "feature_group_count=2.0 must be a positive integer"),
        (lambda: initializers.he_normal(feature_group_count=True), "feature_group_count=True must be a positive"),
        (lambda: initializers.he_normal(in_axis=-1), "in_axis=-1, out_axis=-1: expected two different axes"),
        (lambda: initializers.he_normal(in_axis=5)(jax.random.key(0), (4, 8)), "axis 5 does not exist in a kernel"),
    ],
)
def test_groups_and_axes_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", INITIALIZERS)
def test_every_name_is_a_function_of_the_module(name):
    function = getattr(initializers, name)
    assert name in initializers.__all__
    assert function() == INITIALIZERS[name] == initializers.get(name) == initializers.get(name, "relu")
    assert function(activation="silu") == initializers.get(name, "silu") != INITIALIZERS[name]
    assert "activation" in inspect.signature(function).parameters
    with pytest.raises(ValueError, match=rf"was it not called, as in {name}\(\)"):
        initializers.get(function)


@pytest.mark.parametrize("shape", [(3, 3, 8, 16), (5, 5, 16, 8), (1, 1, 6, 6), (12, 4)])
def test_delta_orthogonal_is_orthogonal_in_the_middle_and_nothing_elsewhere(shape):
    kernel = np.asarray(INITIALIZERS["delta_orthogonal"](jax.random.key(0), shape), np.float64)
    middle = tuple(k // 2 for k in shape[:-2])
    matrix = kernel[middle]
    smaller = matrix @ matrix.T if shape[-2] <= shape[-1] else matrix.T @ matrix
    np.testing.assert_allclose(smaller, 2 * np.eye(min(shape[-2:])), atol=1e-5)
    kernel[middle] = 0
    np.testing.assert_array_equal(kernel, 0)


@pytest.mark.parametrize("name", initializers.OF_JAX)
def test_those_of_jax_are_taken_as_they_are(name):
    init, key, shape = initializers.get(name, "silu"), jax.random.key(0), (3, 3, 8, 16)
    np.testing.assert_array_equal(init(key, shape), getattr(jax.nn.initializers, name)()(key, shape))


@pytest.mark.parametrize("name", INITIALIZERS)
@pytest.mark.parametrize("activation", ["silu", "tanh", "elu"])
def test_a_name_stands_for_the_gain_of_the_activation(name, activation):
    shape, key = (1, 1, 32, 64), jax.random.key(0)
    kernel, relu = (initializers.get(name, one)(key, shape) for one in (activation, "relu"))
    factor = {"he_fan_in": "forward", "brock": "channel"}.get(name, "backward")
    expected = getattr(gain(activation), factor) / getattr(gain("relu"), factor)
    assert np.var(kernel) / np.var(relu) == pytest.approx(expected, rel=1e-5)


def test_an_initializer_that_is_given_keeps_its_own_gain():
    for init in (initializers.he_fan_out("tanh"), jax.nn.initializers.orthogonal()):
        assert initializers.get(init, "silu") is init
    plain = initializers.he_normal("fan_in")
    assert initializers.behind(plain, "silu") == initializers.he_normal("fan_in", "silu")
    constant = initializers.standardize(plain, variance=2.0)
    assert initializers.behind(constant, "silu") is constant

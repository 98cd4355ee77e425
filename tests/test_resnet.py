import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfjax import initializers, layers, resnet
from nfjax.residual import RESIDUALS, Rule
from nfjax.resnet import PreActResNet

# Two blocks in front of a transition, one behind it: all that a network of any depth consists of.
SMALL = {"depth": None, "stage_sizes": (2, 1), "block": "basic"}


def parameters(model):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def counted_by_hand(depth, skip_everywhere):
    """(parameters without norm, batch norm's own, blocks with an identity shortcut): CIFAR, width 64, 10 classes."""
    stages = {
        10: (1, 1, 1, 1),
        18: (2, 2, 2, 2),
        34: (3, 4, 6, 3),
        50: (3, 4, 6, 3),
        101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
    }
    blocks, expansion = stages[depth], 1 if depth < 50 else 4
    total, norm, plain_skips, c_in = 9 * 3 * 64, 0, 0, 64
    for stage, count in enumerate(blocks):
        inner = 64 * 2**stage
        for i in range(count):
            c_out = inner * expansion
            if expansion == 1:
                total += 9 * c_in * inner + 9 * inner * c_out
                norm += 2 * (c_in + inner)
            else:
                total += c_in * inner + 9 * inner * inner + inner * c_out
                norm += 2 * (c_in + inner + inner)
            if c_in != c_out or (stage > 0 and i == 0) or skip_everywhere:
                total += c_in * c_out
            else:
                plain_skips += 1
            c_in = c_out
    return total + 10 * c_in + 10, norm + 2 * c_in, plain_skips


@pytest.mark.parametrize("depth", resnet.STAGES)
def test_parameter_count(depth):
    plain, norm, plain_skips = counted_by_hand(depth, skip_everywhere=False)
    everywhere, _, _ = counted_by_hand(depth, skip_everywhere=True)
    expected = {
        ("identity", None): plain,
        ("identity", "batch"): plain + norm,
        ("learnscalar", None): plain + plain_skips,
        ("convshort", None): everywhere,
    }
    zeros = jax.nn.initializers.zeros  # tracing the random numbers of 152 layers takes seconds
    for (residual, norm_name), count in expected.items():
        model = nnx.eval_shape(lambda r=residual, n=norm_name: PreActResNet(depth, r, n, init=zeros, rngs=nnx.Rngs(0)))
        assert parameters(model) == count
        assert len(model.blocks) == sum(resnet.STAGES[depth][1])


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize(("stem", "sizes"), [("cifar", (32, 32, 16, 8, 4)), ("imagenet", (8, 8, 4, 2, 1))])
def test_resolution_and_width_of_every_stage(stem, sizes, norm):
    model = nnx.eval_shape(
        lambda: PreActResNet(50, "convshort", norm, stem=stem, width=8, num_classes=7, rngs=nnx.Rngs(0))
    )

    def shapes(model, x):
        x = model.stem(x)
        found = [x.shape]
        for block in model.blocks:
            x = block(x)
            found.append(x.shape)
        return model, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in found]

    _, found = nnx.eval_shape(shapes, model, jnp.zeros((2, 32, 32, 3)))
    ends = [found[0], *(found[sum(resnet.STAGES[50][1][: i + 1])] for i in range(4))]
    assert [x.shape for x in ends] == [(2, n, n, c) for n, c in zip(sizes, (8, 32, 64, 128, 256), strict=True)]
    strides = [block.branch.convolutions[1].strides for block in model.blocks]  # on the 3x3 of a bottleneck
    assert [i for i, stride in enumerate(strides) if stride == 2] == [3, 7, 13]


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("norm", [None, "batch"])
def test_every_combination_makes_a_network(depth, residual, norm):
    model = nnx.eval_shape(lambda: PreActResNet(depth, residual, norm, num_classes=5, width=4, rngs=nnx.Rngs(0)))
    out = nnx.eval_shape(lambda model, x: model(x), model, jnp.zeros((2, 16, 16, 3)))
    assert (out.shape, out.dtype) == ((2, 5), jnp.float32)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_without_norm_examples_are_independent(residual):
    """The output and the gradient of one example do not depend on the others in its batch."""
    model = PreActResNet(residual=residual, width=4, rngs=nnx.Rngs(0), **SMALL)
    graph, state = nnx.split(model)
    first, second, other = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))

    @jax.jit
    def output_and_gradients(batch):
        def loss_of_first(state, batch):
            logits = nnx.merge(graph, state)(batch)
            return -jax.nn.log_softmax(logits)[0, 1], logits

        grads, logits = jax.grad(loss_of_first, argnums=(0, 1), has_aux=True)(state, batch)
        return logits[0], grads

    logits, (params_a, inputs_a) = output_and_gradients(jnp.stack([first, second]))
    changed, (params_b, inputs_b) = output_and_gradients(jnp.stack([first, 100 * other]))
    np.testing.assert_array_equal(logits, changed)
    np.testing.assert_array_equal(inputs_a[0], inputs_b[0])
    np.testing.assert_array_equal(inputs_a[1], jnp.zeros_like(inputs_a[1]))  # nothing reaches the other example
    for a, b in zip(jax.tree.leaves(params_a), jax.tree.leaves(params_b), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(a).max()))  # summed over the batch in other chunks


def test_with_batch_norm_examples_are_not_independent():
    model = PreActResNet(residual="identity", norm="batch", width=4, rngs=nnx.Rngs(0), **SMALL)
    first, second, other = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    call = nnx.jit(lambda model, batch: model(batch)[0])
    model.train()
    a, b = call(model, jnp.stack([first, second])), call(model, jnp.stack([first, 100 * other]))
    assert float(jnp.abs(a - b).max()) > 1e-3
    model.eval()
    a, b = call(model, jnp.stack([first, second])), call(model, jnp.stack([first, 100 * other]))
    np.testing.assert_array_equal(a, b)


def window(x):
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


@functools.partial(jax.jit, static_argnums=0)
def pooled(pool, x, cotangent):
    """The output, and the gradient of the input."""
    y, gradient = jax.vjp(pool, x)
    return y, gradient(cotangent)[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (1, 2)])
def test_pooling_takes_the_largest_of_its_window_and_sends_the_gradient_there(size, dtype):
    # No two values are equal, so that the gradient has one place to go.
    values = np.random.default_rng(0).permutation(3 * size[0] * size[1]).reshape(1, *size, 3) - 100.0
    x = jnp.asarray(values / 128, dtype)
    shape = jax.eval_shape(window, x).shape
    cotangent = jnp.asarray(np.random.default_rng(1).integers(-8, 8, shape), dtype)
    y, gradient = pooled(layers.max_pool, x, cotangent)
    expected, expected_gradient = pooled(window, x, cotangent)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(gradient, expected_gradient)


def test_values_that_are_equal_share_the_gradient_of_their_window():
    x = jnp.asarray([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 2.0]]).reshape(1, 3, 3, 1)
    y, shared = pooled(layers.max_pool, x, jnp.asarray([[4.0, 8.0], [16.0, 32.0]]).reshape(1, 2, 2, 1))
    np.testing.assert_array_equal(y.reshape(2, 2), [[1, 1], [2, 2]])
    np.testing.assert_array_equal(shared.reshape(3, 3), [[2, 2 + 8, 0], [0, 0, 0], [16, 0, 32]])


def test_pooling_has_derivatives_of_any_kind():
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    dx = jnp.cos(x)

    @functools.partial(jax.jit, static_argnums=0)
    def of(pool):
        curved = lambda x: (jnp.sin(pool(x)) * x[:, ::2, ::2]).sum()  # noqa: E731
        return (
            jax.jvp(pool, (x,), (dx,)),
            jax.jvp(jax.grad(curved), (x,), (dx,)),
            jax.grad(lambda x: (jax.grad(curved)(x) ** 2).sum())(x),
            jax.vmap(jax.grad(lambda x: curved(x[None])))(x),
        )

    for expected, ours in zip(*map(jax.tree.leaves, map(of, (window, layers.max_pool))), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [None, "batch"])
def test_bfloat16_computes_in_bfloat16_over_float32_parameters(norm):
    make = functools.partial(PreActResNet, residual="learnscalar", norm=norm, width=8, **SMALL)
    model = make(dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    # flax's BatchNorm itself promotes bfloat16 to float32 for its statistics.
    with jax.numpy_dtype_promotion("standard" if norm else "strict"):
        block = nnx.eval_shape(lambda model: model.blocks[0](model.stem(images.astype(jnp.bfloat16))), model)
        assert block.dtype == jnp.bfloat16
        half = nnx.jit(lambda model: model(images))(model)
    full = nnx.jit(lambda model: model(images))(make(rngs=nnx.Rngs(0)))
    assert half.dtype == jnp.float32
    assert float(jnp.abs(half - full).max() / jnp.abs(full).max()) < 0.1


@pytest.mark.parametrize("norm", [None, "batch"])
def test_rematerialized_blocks_give_the_same_gradient_and_keep_less(norm):
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    outcomes, kept = [], []
    for remat in (False, True):
        model = PreActResNet(residual="convshort", norm=norm, width=8, remat=remat, rngs=nnx.Rngs(0), **SMALL)
        graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

        def loss(params, graph=graph, stats=stats):
            model = nnx.merge(graph, params, stats, copy=True)
            return (model(images) ** 2).mean(), nnx.state(model, nnx.BatchStat)

        outcomes.append(jax.tree.leaves(jax.jit(jax.grad(loss, has_aux=True))(params)))
        backward = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params, has_aux=True)[1], params)
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(backward)))
    for ours, theirs in zip(*outcomes, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert kept[1] < 0.7 * kept[0]


def test_every_kernel_is_standardized():
    model = PreActResNet(18, "convshort", init="he_fan_out", width=8, rngs=nnx.Rngs(1))
    convolutions = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Conv)]
    assert len(convolutions) == 1 + 8 * 3
    for conv in convolutions:
        kernel = np.asarray(conv.kernel[...], np.float64)
        assert kernel.var() == pytest.approx(2 / (math.prod(conv.kernel_size) * conv.out_features), rel=1e-5)
        assert abs(kernel.mean()) < 1e-6 * kernel.std()
    dense = np.asarray(model.classifier.kernel[...], np.float64)
    assert dense.var() == pytest.approx(1 / dense.shape[0], rel=1e-5)
    assert not model.classifier.bias[...].any()


def test_effective_fan_out_knows_each_layer():
    model = PreActResNet(18, "idshort", init="he_effective_fan_out", width=8, image_size=(16, 24), rngs=nnx.Rngs(0))
    strided = model.blocks[2].branch.convolutions[0]  # 3x3, stride 2, on 16x24 pixels
    taps = initializers.effective_taps((3, 3), 2, 1, (16, 24))
    assert float(strided.kernel[...].var()) == pytest.approx(2 / (16 * taps), rel=1e-5)
    shortcut = model.blocks[2].residual.shortcut  # 1x1, stride 2
    assert float(shortcut.kernel[...].var()) == pytest.approx(2 / (16 / 4), rel=1e-5)
    last = model.blocks[-1].branch.convolutions[1]  # 3x3 on 2x3 pixels
    assert float(last.kernel[...].var()) == pytest.approx(2 / (64 * (4 / 2) * (7 / 3)), rel=1e-5)


def test_seeds_and_callables():
    images = jnp.ones((1, 8, 8, 3))
    call = nnx.jit(lambda model: model(images))
    a, b, c = (call(PreActResNet(width=4, rngs=nnx.Rngs(seed), **SMALL)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert float(jnp.abs(a - c).max()) > 0
    model = PreActResNet(width=4, init=jax.nn.initializers.constant(0.5), rngs=nnx.Rngs(0), **SMALL)
    assert float(model.stem.conv.kernel[...].min()) == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 20}, "unknown depth 20: expected one of 10, 18, 34, 50, 101, 152"),
        ({"depth": None}, "depth=None, stage_sizes=None: expected one of the two"),
        ({"stage_sizes": (1,)}, r"depth=18, stage_sizes=\(1,\): expected one of the two"),
        ({"depth": None, "stage_sizes": (1, 0), "block": "basic"}, r"stage_sizes=\(1, 0\): expected a positive number"),
        ({"depth": None, "stage_sizes": ()}, r"stage_sizes=\(\): expected a positive number"),
        ({"depth": None, "stage_sizes": (1,)}, r"needs a block: expected one of basic, bottleneck"),
        ({"block": "base"}, "unknown block 'base'.*basic, bottleneck"),
        ({"activation": "rlu"}, "unknown activation 'rlu'.*relu"),
        ({"residual": "convshot"}, "unknown residual 'convshot'.*convshort"),
        ({"norm": "layer"}, "unknown norm 'layer'.*batch"),
        ({"init": "he"}, "unknown init 'he'.*he_fan_out"),
        ({"stem": "mnist"}, "unknown stem 'mnist'.*cifar, imagenet"),
        ({"width": 0}, "width=0 must be a positive integer"),
        ({"num_classes": -1}, "num_classes=-1 must be a positive integer"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PreActResNet(**({"depth": 18} | settings), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 3, 8, 8), (2, 8, 8, 1)])
def test_bad_images(shape):
    model = nnx.eval_shape(lambda: PreActResNet(18, width=4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"expected \[B, H, W, 3\]"):
        nnx.eval_shape(lambda model: model(jnp.zeros(shape)), model)


def test_a_norm_of_ones_own():
    model = PreActResNet(width=4, norm=functools.partial(nnx.GroupNorm, num_groups=2), rngs=nnx.Rngs(0), **SMALL)
    assert isinstance(model.blocks[0].activation.norm, nnx.GroupNorm)
    assert bool(jnp.isfinite(nnx.jit(lambda model: model(jnp.ones((1, 8, 8, 3))))(model)).all())


@pytest.mark.parametrize("residual", ["idshort", "convshort"])
def test_building_is_quick(residual):
    """The issue's bound is 5 s and 1 s on 2 idle cores; the test allows for a busy machine."""
    code = """
import sys, time, jax
from flax import nnx
from nfjax.residual import RESIDUALS, Rule
from nfjax.resnet import PreActResNet
for _ in range(2):
    start = time.perf_counter()
    model = PreActResNet(101, sys.argv[1], rngs=nnx.Rngs(0))
    jax.block_until_ready(nnx.state(model))
    print(time.perf_counter() - start)
"""
    cold = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}  # no compilation cache
    command = [sys.executable, "-c", code, residual]
    out = subprocess.run(command, env=cold, capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) < 10
    assert float(out[1]) < 4


def test_the_beta_of_a_block_knows_the_stages_before_it():
    seen = []

    def rule(position):
        seen.append((position.index, position.num_blocks, position.stage_sizes, position.transition))
        return Rule()

    PreActResNet(stage_sizes=(2, 1), block="basic", residual=rule, width=4, rngs=nnx.Rngs(0))
    assert seen == [(0, 3, (2, 1), False), (1, 3, (2, 1), False), (2, 3, (2, 1), True)]


def test_parts_of_ones_own():
    """Stages, block, activation, convolution and the head's initializer, each an argument."""

    class Small(resnet.BasicBlock):
        """One convolution."""

        num_convolutions = 1

        @classmethod
        def layout(cls, position):
            return [(position.in_features, position.out_features, 3, position.stride)]

    def biased(c_in, c_out, k, stride, size, *, init, dtype, rngs):
        return nnx.Conv(c_in, c_out, (k, k), stride, kernel_init=init, dtype=dtype, rngs=rngs)

    model = PreActResNet(
        stage_sizes=(2, 1), block=Small, activation="tanh", conv=biased, head_init=jax.nn.initializers.zeros, width=4,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    assert [len(block.branch.convolutions) for block in model.blocks] == [1, 1, 1]
    assert model.blocks[0].branch.convolutions[0].bias is not None
    assert not model.classifier.kernel[...].any()
    x = jnp.full((1, 8, 8, 3), 2.0)
    np.testing.assert_allclose(model.blocks[0].activation(x), jnp.tanh(x))
    assert model.activation(model.blocks[-1](jnp.ones((1, 8, 8, 4)))).shape == (1, 4, 4, 8)
    np.testing.assert_array_equal(model(x), 0.0)


def test_names_of_depths():
    model = nnx.eval_shape(lambda: resnet.resnet101(residual="convshort", width=8, rngs=nnx.Rngs(0)))
    assert len(model.blocks) == 33
    assert isinstance(nnx.eval_shape(lambda: resnet.resnet18(width=8, rngs=nnx.Rngs(0))).blocks[0], resnet.BasicBlock)
    with pytest.raises(TypeError):
        resnet.STAGES[6] = (resnet.BasicBlock, (1, 1))


def test_an_initializer_by_name_has_the_gain_of_the_activation():
    """Behind a ReLU gradients are halved; behind SiLU another share is left, for which the kernels make up."""
    relu, silu = (
        resnet.PreActResNet(10, width=8, image_size=8, activation=activation, rngs=nnx.Rngs(0))
        for activation in ("relu", "silu")
    )
    factor = initializers.gain("silu").backward / 2
    for a, b in zip(relu.blocks, silu.blocks, strict=True):
        for one, other in zip(a.branch.convolutions, b.branch.convolutions, strict=True):
            assert np.var(other.kernel[...]) / np.var(one.kernel[...]) == pytest.approx(factor, rel=1e-5)
    given = resnet.PreActResNet(
        10, width=8, image_size=8, activation="silu", init=initializers.he_fan_out(), rngs=nnx.Rngs(0)
    )
    np.testing.assert_array_equal(given.stem.conv.kernel[...], relu.stem.conv.kernel[...])


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_what_is_faster_on_a_platform_is_chosen_by_what_a_program_is_lowered_for(platform):
    """Traced on this machine: matrix products and shifted images for CPUs and CUDA, cells of pixels for CUDA."""
    model = PreActResNet(10, "convshort", stem="imagenet", width=4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    text = jax.export.export(forward, platforms=[platform])(state, jnp.zeros((1, 32, 32, 3))).mlir_module()
    pointwise = sum("stablehlo.convolution" in line and ", tensor<1x1x" in line for line in text.splitlines())
    assert pointwise == {"cpu": 0, "cuda": 3}.get(platform, 4)  # on CUDA, those with stride 2
    assert ("reduce_window" in text) == (platform not in ("cpu", "cuda"))
    assert ("tensor<1x16x16x12xf32>, tensor<4x4x12x4xf32>" in text) == (platform == "cuda")

"""The convolution of our layers: JAX's own value and gradients, in other forms on CPUs and CUDA GPUs. What else is done
on a CPU.
"""

import functools
import os
import subprocess
import sys
import warnings
from platform import libc_ver

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec

from nfjax import _convolution, _cpu, compilation

LAYOUT = ("NHWC", "HWIO", "NHWC")
JAX = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=LAYOUT)
OURS = functools.partial(_convolution.conv_general_dilated, dimension_numbers=LAYOUT)

# Images, height and width, kernel, strides, padding, dilation: of full groups of images, with a rest, of a single one.
WINDOWS = {
    "3x3": (32, (8, 8), (3, 3), (1, 1), "SAME", (1, 1)),
    "rest": (37, (5, 7), (3, 3), (1, 1), "SAME", (1, 1)),
    "few": (3, (6, 6), (3, 3), (1, 1), "VALID", (1, 1)),
    "strided": (20, (9, 8), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1)),
    "stem": (5, (16, 16), (7, 7), (2, 2), ((3, 3), (3, 3)), (1, 1)),
    "uneven": (18, (7, 6), (2, 3), (3, 1), ((1, 0), (2, 1)), (1, 1)),
    "dilated": (19, (9, 9), (3, 3), (1, 2), ((2, 2), (2, 2)), (2, 2)),
    "smaller": (20, (2, 2), (3, 3), (1, 1), "SAME", (1, 1)),
    "smaller, odd": (7, (3, 5), (5, 4), (2, 1), ((4, 5), (3, 3)), (2, 1)),
    "1x1": (6, (5, 5), (1, 1), (2, 2), "VALID", (1, 1)),
    "pixels": (6, (5, 5), (1, 1), (1, 1), "VALID", (1, 1)),
}
TRANSFORMATIONS = {
    "reverse": lambda f, x, w: jax.vjp(f, x, w)[1](jnp.sin(f(x, w))),
    "forward": lambda f, x, w: jax.jvp(f, (x, w), (x + 1, w * w)),
    "forward over reverse": lambda f, x, w: jax.jvp(jax.grad(lambda w: (f(x, w) ** 2).sum()), (w,), (w + 1,))[1],
    "reverse over reverse": lambda f, x, w: jax.grad(
        lambda x: (jax.grad(lambda w: jnp.sin(f(x, w)).sum())(w) ** 2).sum()
    )(x),
    "vmap of kernels": lambda f, x, w: jax.vmap(jax.grad(lambda w: (f(x, w) ** 2).sum()))(jnp.stack([w, -w, w * w])),
    "vmap of images": lambda f, x, w: jax.vmap(jax.grad(lambda x: (f(x[None], w) ** 2).sum()))(x),
}  # fmt: skip


def arguments(name, dtype=jnp.float32):
    images, size, kernel, strides, padding, dilation = WINDOWS[name]
    keys = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(keys[0], (images, *size, 4)), jax.random.normal(keys[1], (*kernel, 4, 6))
    return x.astype(dtype), w.astype(dtype), {"window_strides": strides, "padding": padding, "rhs_dilation": dilation}


def calls(settings):
    """(JAX's own, ours) as functions of images and kernel."""
    strides, padding, dilation = settings.values()
    return tuple(lambda x, w, f=f: f(x, w, strides, padding, rhs_dilation=dilation) for f in (JAX, OURS))


def difference(ours, expected):
    """The largest, relative to the largest value expected."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True)
    scaled = ((np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in scaled)


@pytest.fixture(params=[True, False], ids=["onednn", "products"])
def form(request, monkeypatch):
    """Both forms of the kernel's gradient, and groups small enough that there are several."""
    monkeypatch.setattr(_cpu, "has_onednn", lambda: request.param)
    monkeypatch.setattr(_convolution, "GROUP_BYTES", 2**15)


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("name", WINDOWS)
def test_every_derivative_is_that_of_jax(form, name, transformation):
    x, w, settings = arguments(name)
    results = [jax.jit(functools.partial(TRANSFORMATIONS[transformation], f))(x, w) for f in calls(settings)]
    assert difference(results[1], results[0]) < 1e-5


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("name", ["strided", "stem", "uneven", "pixels"])
def test_every_derivative_of_the_forms_for_a_gpu_is_that_of_jax(monkeypatch, name, transformation):
    x, w, settings = arguments(name)
    transformed = [jax.jit(functools.partial(TRANSFORMATIONS[transformation], f)) for f in calls(settings)]
    expected = transformed[0](x, w)
    # Here a GPU's programs can be lowered, but do not run: they are run as a CPU's.
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cuda, **others: cuda(*operands))
    assert difference(transformed[1](x, w), expected) < 1e-5


@pytest.mark.parametrize("name", ["rest", "strided"])
def test_sums_over_groups_are_not_rounded_to_bfloat16(form, monkeypatch, name):
    monkeypatch.setattr(_convolution, "GROUP_IMAGES", 1)
    monkeypatch.setattr(_convolution, "GROUP_BYTES", 1)
    x, w, settings = arguments(name, jnp.bfloat16)
    plain, ours = (jax.jit(functools.partial(TRANSFORMATIONS["reverse"], f))(x, w) for f in calls(settings))
    assert {leaf.dtype for leaf in ours} == {jnp.dtype(jnp.bfloat16)}
    assert difference(ours, plain) < 0.005


def test_images_smaller_than_the_kernel_are_products_on_a_cpu_only():
    """XLA's own convolution of these takes up to 90 times as long there."""
    x, w, settings = arguments("smaller")
    traced = jax.jit(calls(settings)[1]).trace(x, w)
    found = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda", "tpu")}
    assert {platform: "stablehlo.convolution" in text for platform, text in found.items()} == {
        "cpu": False,
        "cuda": True,
        "tpu": True,
    }
    x, w, settings = arguments("few")  # whose images are larger
    assert "stablehlo.convolution" in jax.jit(calls(settings)[1]).lower(x, w).as_text()


def test_the_form_is_that_of_the_platform_it_is_lowered_for(form):
    x, w, settings = arguments("3x3")

    def convolutions(f, platform):
        """The shapes of their operands and results."""
        gradient = jax.jit(jax.grad(lambda w: (f(x, w) ** 2).sum()))
        lines = gradient.trace(w).lower(lowering_platforms=(platform,)).as_text().splitlines()
        return sorted(line.split(" : ")[-1] for line in lines if "stablehlo.convolution" in line)

    plain, ours = calls(settings)
    for platform in ("cuda", "tpu"):
        assert convolutions(ours, platform) == convolutions(plain, platform)
    assert convolutions(ours, "cpu") != convolutions(plain, "cpu")


@pytest.mark.parametrize(("name", "platforms"), [("pixels", ("cpu", "cuda")), ("1x1", ("cpu",)), ("stem", ("cuda",))])
def test_what_is_another_form_on_a_gpu(name, platforms):
    """Products, and the channels of whole cells."""
    x, w, settings = arguments(name)

    def operations(f, platform):
        lines = jax.jit(f).trace(x, w).lower(lowering_platforms=(platform,)).as_text().splitlines()
        return sorted(line.split("stablehlo.")[1] for line in lines if "stablehlo.convolution" in line)

    plain, ours = calls(settings)
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        assert (operations(ours, platform) != operations(plain, platform)) is (platform in platforms)


def test_a_gradient_can_be_exported_for_all_platforms_at_once(form):
    x, w, settings = arguments("rest")
    gradients = [jax.jit(jax.grad(lambda w, x, f=f: (f(x, w) ** 2).sum())) for f in calls(settings)]
    program = jax.export.export(gradients[1], platforms=("cpu", "cuda", "tpu"))(w, x)
    assert difference(program.call(w, x), gradients[0](w, x)) < 1e-5


@pytest.mark.parametrize("name", ["rest", "strided", "1x1"])
@pytest.mark.parametrize("where", ["inside", "around"])
def test_under_shard_map_with_its_checks(form, name, where):
    x, w, settings = arguments(name)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, divided = PartitionSpec(), PartitionSpec("data")

    def gradient(f):
        def loss(w, x):
            return jax.lax.psum((f(x, w) ** 2).sum(), "data")

        sharded = functools.partial(jax.shard_map, mesh=mesh, in_specs=(everywhere, divided))
        if where == "inside":
            return sharded(lambda w, x: jax.grad(loss, (0, 1))(w, x), out_specs=(everywhere, divided))
        return jax.grad(sharded(loss, out_specs=everywhere), (0, 1))

    expected, ours = (jax.jit(gradient(f))(w, x) for f in calls(settings))
    assert difference(ours, expected) < 1e-5


def test_in_a_loop(form):
    x, w, settings = arguments("rest")

    def descent(f):
        of_kernel = jax.grad(lambda w: (f(x, w) ** 2).sum())
        return jax.jit(lambda w: jax.lax.scan(lambda w, _: (w - 1e-6 * of_kernel(w), None), w, None, length=3)[0])

    expected, ours = (descent(f)(w) for f in calls(settings))
    assert difference(ours, expected) < 1e-5


@pytest.mark.parametrize(
    ("shapes", "settings"),
    [
        (((4, 6, 6, 4), (3, 3, 2, 6)), {"feature_group_count": 2}),
        (((4, 6, 6, 4), (3, 3, 4, 6)), {"batch_group_count": 2}),
        (((4, 6, 6, 4), (3, 3, 4, 6)), {"lhs_dilation": (2, 2)}),
        (((4, 6, 6, 4), (3, 3, 4, 6)), {"padding": ((-1, 1), (1, 1))}),
        (((0, 6, 6, 4), (3, 3, 4, 6)), {}),
        (((4, 2, 2, 4), (5, 5, 4, 6)), {"padding": "VALID"}),
        (((4, 4, 6, 6), (6, 4, 3, 3)), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
    ],
    ids=["groups", "batch groups", "dilated input", "negative padding", "no images", "small images", "NCHW"],
)
def test_what_is_not_plain_is_jaxs_own(shapes, settings):
    x, w = map(jnp.ones, shapes)
    settings = {"dimension_numbers": LAYOUT, "padding": ((1, 1), (1, 1))} | settings
    plain, ours = (
        str(jax.make_jaxpr(lambda x, w, f=f: f(x, w, (1, 1), **settings))(x, w))
        for f in (jax.lax.conv_general_dilated, _convolution.conv_general_dilated)
    )
    assert plain == ours


def test_one_dimension_is_jaxs_own():
    x, w = jnp.ones((2, 8, 3)), jnp.ones((3, 3, 4))
    numbers = ("NWC", "WIO", "NWC")
    ours = _convolution.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers)
    np.testing.assert_array_equal(ours, jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers))


@pytest.mark.parametrize(
    ("kernel", "settings"),
    [
        ((3, 3, 5, 6), {"padding": "SAME"}),
        ((1, 1, 5, 6), {"padding": "SAME"}),
        ((3, 3, 4, 6), {"padding": 1}),
        ((3, 3, 4, 6), {"padding": "SAME", "bogus": 1}),
        ((1, 1, 4, 6), {"padding": "SAME", "window_strides": (1, 1, 1)}),
    ],
)
def test_what_is_wrong_is_told_as_jax_does(kernel, settings):
    x, w = jnp.ones((4, 6, 6, 4)), jnp.ones(kernel)
    strides = settings.pop("window_strides", (1, 1))
    with pytest.raises((TypeError, ValueError)) as expected:
        JAX(x, w, strides, **settings)
    with pytest.raises(expected.type) as ours:
        OURS(x, w, strides, **settings)
    assert str(ours.value) == str(expected.value) or "bogus" in settings


def test_residuals_are_those_of_jax(form):
    """Between a forward and a backward program the images are kept once, and no patches."""
    x, w, settings = arguments("rest")
    kept = [jax.jit(lambda x, w, f=f: jax.vjp(f, x, w)[1])(x, w) for f in calls(settings)]
    plain, ours = (sum(leaf.nbytes for leaf in jax.tree.leaves(residuals)) for residuals in kept)
    assert ours <= plain + w.nbytes


def test_layers_of_flax_take_it():
    x = jax.random.normal(jax.random.key(0), (3, 6, 6, 4))
    ours = nnx.Conv(4, 5, (3, 3), strides=2, conv_general_dilated=_convolution.conv_general_dilated, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(ours(x), nnx.Conv(4, 5, (3, 3), strides=2, rngs=nnx.Rngs(0))(x), rtol=1e-6)
    linen = nn.Conv(5, (3, 3), conv_general_dilated=_convolution.conv_general_dilated)
    variables = linen.init(jax.random.key(0), x)
    np.testing.assert_allclose(linen.apply(variables, x), nn.Conv(5, (3, 3)).apply(variables, x), rtol=1e-6)


def test_images_without_a_gradient_cost_none(form):
    x, w, settings = arguments("3x3")
    _, ours = calls(settings)

    def convolutions(arguments):
        program = jax.jit(jax.grad(lambda x, w: (ours(x, w) ** 2).sum(), arguments)).lower(x, w).as_text()
        return program.count("stablehlo.convolution")

    assert convolutions((0, 1)) == convolutions(1) + 1


def test_a_cpus_programs_have_onednn_where_they_may():
    options = _cpu.compiler_options("cpu")
    assert bool(options) is (jax.__version_info__ >= (0, 11))
    assert not _cpu.compiler_options("gpu")
    assert not _cpu.compiler_options("cpu", onednn=False)
    x, w, settings = arguments("3x3")
    with compilation.not_kept(options):
        program = jax.jit(calls(settings)[1]).lower(x, w).compile(options)
    assert ("__onednn$" in program.as_text()) is bool(options)


MEMORY = """
import resource
import numpy as np
from nfjax import _cpu
{keep}
def step():
    np.ones(2**26, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = [step() for _ in range(4)][-1]
print(step() - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or libc_ver()[0] != "glibc", reason="glibc's memory")
def test_memory_stays_with_the_process():
    def faults(keep):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""}
        command = [sys.executable, "-c", MEMORY.format(keep=keep)]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    assert faults("_cpu.keep_memory()") == 0 < faults("")


def test_a_process_for_an_accelerator_keeps_no_memory(monkeypatch):
    called = []
    monkeypatch.setattr(_cpu.ctypes, "CDLL", lambda name: called.append(name))
    monkeypatch.setattr(_cpu, "ACCELERATORS", ("null",))  # which every /dev has
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    _cpu.keep_memory()
    assert not called


@pytest.mark.parametrize(("options", "told"), [({}, 1), ({"some": True}, 0)])
def test_only_what_is_known_not_to_be_kept_is_no_warning(options, told):
    def warn():
        said = "Error writing persistent compilation cache entry for 'jit_f': MemoryError: std::bad_alloc"
        warnings.warn(said, stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with compilation.not_kept(options):
            warn()
        warn()
    assert len(caught) == 1 + told

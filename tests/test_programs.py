"""What a training step holds when it is lowered for an accelerator, for which none is needed: whatever costs time or
memory is counted, so that one more of it is seen. docs/concepts/programs.md explains what is there.
"""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from nfjax import config as configs
from nfjax.training import networks, optimizers, preprocessing, schedules
from nfjax.training import step as steps
from nfjax.training.state import Batch, Steps, TrainState

BATCH, EXAMPLES, CLASSES, STEPS = 8, 100, 10, 5
# The dimensions of a convolution's operands and result: channels last, but for what a gradient exchanges.
FORWARD = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
OF_INPUT = "[b, 0, 1, f]x[0, 1, o, i]->[b, 0, 1, f]"
OF_KERNEL = "[f, 0, 1, b]x[i, 0, 1, o]->[0, 1, b, f]"
# What moves data, makes the host wait or the program branch.
COSTLY = (
    *("transpose", "gather", "scatter", "pad", "reverse", "sort", "dynamic_slice", "dynamic_update_slice"),
    *("while", "custom_call", "infeed", "outfeed", "send", "recv"),
)
SETTINGS = {
    "IdShort": {"model.residual": "idshort"},
    "BatchNorm": {"model.residual": "identity", "model.norm": "batch", "model.dtype": "bfloat16"},
    "ResNet-50": {
        "model.depth": 50,
        "model.residual": "idshort",
        "model.dtype": "bfloat16",
        "model.stem": "imagenet",
        "data.image_size": 64,
        "optim.ema_decay": 0.999,
        "optim.label_smoothing": 0.1,
    },
}
PLATFORMS = ("cuda", "tpu")
everywhere = pytest.mark.parametrize(
    ("name", "platform"),
    [pytest.param(name, platform, id=f"{name}, {platform}") for name in SETTINGS for platform in PLATFORMS],
)


class Case:
    """The training step of some settings, with shapes for arrays."""

    def __init__(self, name):
        self.config = config = configs.base()
        config.batch_size, config.model.width, config.augment.rand_operations = BATCH, 8, 0
        config.update_from_flattened_dict(SETTINGS[name])
        network, params, batch_stats = networks.as_functions(networks.shapes(config, CLASSES))
        optimizer, decay = optimizers.build(config, schedules.build(config, [100, 200])), config.optim.ema_decay
        start = functools.partial(TrainState.start, optimizer=optimizer, ema=decay is not None)
        self.state = jax.eval_shape(start, params, batch_stats)
        preprocess, smoothing = preprocessing.make_preprocess(config), config.optim.label_smoothing
        self.task = steps.Task(network, optimizer, preprocess, None, smoothing, decay)
        self.kernels = ["x".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(params) if leaf.ndim == 4]
        self.stem = "x".join(map(str, params["stem"]["conv"]["kernel"].shape))
        self.imagenet = config.model.stem == "imagenet"
        self.features = params["classifier"]["kernel"].shape[0]
        self.norms = len(jax.tree.leaves(batch_stats)) // 2  # each has a mean and a variance

    def examples(self, count):
        size = self.config.data.image_size
        image = jax.ShapeDtypeStruct((count, size, size, 3), jnp.uint8)
        return Batch(image, jax.ShapeDtypeStruct((count,), jnp.int32), jax.ShapeDtypeStruct((count,), jnp.float32))

    def products(self, platform):
        """The 1x1 kernels of stride 1, which on CUDA are no convolutions but products."""
        channels = self.config.model.width * (4 if self.imagenet else 1)
        shortcuts = [f"1x1x{channels << stage}x{channels << stage + 1}" for stage in range(3)]  # with stride 2
        pointwise = [kernel for kernel in self.kernels if kernel.startswith("1x1x")]
        return collections.Counter(pointwise) - collections.Counter(shortcuts) if platform == "cuda" else {}

    def convolved(self, platform):
        """The kernels of convolutions."""
        return collections.Counter(self.kernels) - collections.Counter(self.products(platform))

    @functools.cached_property
    def traced(self):
        with jax.numpy_dtype_promotion("standard"):  # which flax's batch norm needs in bfloat16
            return steps.train_step.trace(self.state, self.examples(BATCH), jax.random.key(0), task=self.task)


@functools.cache
def case(name):
    return Case(name)


@functools.cache
def program(name, platform):
    """The case's training step, lowered."""
    return case(name).traced.lower(lowering_platforms=(platform,))


@functools.cache
def operations(program):
    """(kind, types) of every operation of a program, such as ("transpose", "10x64xf32 -> 64x10xf32")."""
    found = []
    for line in program.as_text().splitlines():
        if (match := re.search(r"= \"?stablehlo\.(\w+)", line)) is not None:
            types = re.sub(r"tensor<([^>]*)>", r"\1", line.rpartition(" : ")[2]).replace("(", "").replace(")", "")
            dimensions = re.search(r"dim_numbers = (.*), window", line)
            found.append((match[1], f"{dimensions[1]} {types}" if dimensions else types))
    return found


def counted(program, kind):
    return collections.Counter(types for operation, types in operations(program) if operation == kind)


def donated(text):
    """The results that take over the memory of an argument, by number."""
    return sorted(int(number) for number in re.findall(r"tf\.aliasing_output = (\d+)", text))


@everywhere
def test_every_convolution_is_channels_last_and_in_the_type_of_the_network(name, platform):
    narrow = {"float32": "f32", "bfloat16": "bf16"}[case(name).config.model.dtype]
    dimensions = collections.Counter()
    for what, count in counted(program(name, platform), "convolution").items():
        how, types = re.fullmatch(r"(.*\]) (.*)", what).groups()
        assert {part.rpartition("x")[2] for part in re.split(", | -> ", types)} == {narrow}, what
        dimensions[how] += count
    number = sum(case(name).convolved(platform).values())
    assert dimensions == {FORWARD: number, OF_INPUT: number - 1, OF_KERNEL: number}  # images need no gradient


def stem_moves(size, width):
    """What the ImageNet stem moves on CUDA, in bfloat16."""
    half, quarter = size // 2, size // 4

    def changed(before, after, count=1):
        before, after = (shaped(*sizes, dtype="bf16") for sizes in (before, after))
        return {f"{before}, bf16 -> {after}": count}

    def ordered(before, after):
        return {" -> ".join(shaped(*sizes, dtype="bf16") for sizes in (before, after)): 1}

    whole, pooled = (BATCH, half, half, width), (BATCH, quarter, quarter, width)
    kernel, cells, apart = (7, 7, 3, width), (4, 4, 2, 2, 3, width), (4, 2, 4, 2, 3, width)
    return {
        # Images and kernel as cells, the kernel's gradient as a kernel.
        "transpose": {
            **ordered((BATCH, half, 2, half, 2, 3), (BATCH, half, half, 2, 2, 3)),
            **ordered(apart, cells),
            **ordered(cells, apart),
        },
        "pad": {
            **changed((BATCH, size, size, 3), (BATCH, size, size, 3)),  # its size is even
            **changed(kernel, (8, 8, 3, width)),
            **changed((8, 8, 3, width), kernel),
            # Max-pooling: the border, forward and backward; values and gradients of the three windows beside a pixel's
            # own, and three times nothing, which JAX's transposition of a padding adds.
            **changed(whole, (BATCH, half + 2, half + 2, width), 2),
            **changed(whole, whole),
            **changed(pooled, pooled, 9),
        },
    }


def shaped(*sizes, dtype):
    return "x".join(map(str, (*sizes, dtype)))


@everywhere
def test_nothing_is_moved_but_what_has_a_reason(name, platform):
    here, size = case(name), case(name).config.data.image_size
    image, padded = f"{BATCH}x{size}x{size}x3xui8", f"{BATCH}x{size + 8}x{size + 8}x3xui8"
    narrow = {"float32": "f32", "bfloat16": "bf16"}[here.config.model.dtype]
    reasons = {
        # The gradient of the classifier.
        "transpose": {f"{CLASSES}x{here.features}xf32 -> {here.features}x{CLASSES}xf32": 1},
        # The crop.
        "pad": {f"{image}, ui8 -> {padded}": 1},
        "gather": {f"{padded}, {BATCH}x3xi32 -> {image}": 1},
        # The flip. A gradient with respect to an input takes its kernel turned around, and cuDNN and TPUs do that.
        "reverse": here.convolved(platform) + collections.Counter([image]) - collections.Counter([here.stem]),
    }
    if platform == "cuda":
        moved = {kind: collections.Counter(reasons[kind]) for kind in ("transpose", "pad")}
        # A 1x1 kernel's gradient, which the product itself gives in the other order.
        for kernel, count in here.products(platform).items():
            *_, c, d = map(int, kernel.split("x"))
            moved["transpose"][f"{shaped(d, c, dtype=narrow)} -> {shaped(c, d, dtype=narrow)}"] += count
        if here.imagenet:
            for kind, of_stem in stem_moves(size, here.config.model.width).items():
                moved[kind].update(of_stem)
        reasons |= moved
    for kind in COSTLY:
        found = counted(program(name, platform), kind)
        if kind == "reverse":
            found = collections.Counter({re.sub(r"xb?f\d+$", "", types): count for types, count in found.items()})
        assert found == reasons.get(kind, {}), kind


@everywhere
def test_numbers_change_their_type_where_they_have_to(name, platform):
    """The images, the head's input and its gradient, whatever a norm sees; each kernel and its gradient."""
    here, changes = case(name), collections.Counter()
    for types, count in counted(program(name, platform), "convert").items():
        (shape, _, before), *result = (each.rpartition("x") for each in types.split(" -> "))
        is_kernel, is_activation = shape in here.kernels, shape.startswith(f"{BATCH}x") and shape.count("x") == 3
        if (is_kernel or is_activation) and result and result[0][2] in ("f32", "bf16"):
            changes["kernel" if is_kernel else "activation", before, result[0][2]] += count
    images = {("activation", "ui8", "f32"): 1}
    if here.config.model.dtype == "float32":
        assert changes == images
    else:
        # Which of its nine values a maximum is, counted for max-pooling's gradient.
        ties = {("activation", "i1", "bf16"): 9} if platform == "cuda" and here.imagenet else {}
        assert changes == images | ties | {
            ("activation", "f32", "bf16"): 2 + 3 * here.norms,
            ("activation", "bf16", "f32"): 1 + 3 * here.norms,
            ("kernel", "f32", "bf16"): len(here.kernels),
            ("kernel", "bf16", "f32"): len(here.kernels),
        }
    assert "f64" not in program(name, platform).as_text()


@everywhere
def test_the_state_is_changed_in_place(name, platform):
    assert donated(program(name, platform).as_text()) == list(range(len(jax.tree.leaves(case(name).state))))


@everywhere
def test_nothing_is_left_of_the_choice_between_platforms(name, platform):
    assert " conditional(" not in program(name, platform).as_text("hlo")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_many_steps_in_one_dispatch_are_one_loop(platform):
    here = case("IdShort")
    indices = jax.ShapeDtypeStruct((STEPS, BATCH), jnp.int32)
    work = Steps(here.examples(EXAMPLES), indices, jax.ShapeDtypeStruct((), jnp.int32))
    traced = steps.train_steps.trace(here.state, work, jax.random.key(0), task=here.task)
    loop = traced.lower(lowering_platforms=(platform,))
    kinds, of_step = (
        collections.Counter(kind for kind, _ in operations(each) if kind in (*COSTLY, "convolution"))
        for each in (loop, program("IdShort", platform))
    )
    assert kinds.pop("dynamic_update_slice")  # of the sums
    batch = {"gather": 3, "dynamic_slice": 1}  # images, labels and mask, by a row of the indices
    assert kinds == of_step + collections.Counter({"while": 1} | batch)
    assert donated(loop.as_text()) == list(range(len(jax.tree.leaves(here.state))))


def test_a_step_can_be_exported():
    here = case("IdShort")
    export = jax.export.export(steps.train_step, platforms=PLATFORMS)
    exported = export(here.state, here.examples(BATCH), jax.random.key(0), task=here.task)
    assert exported.platforms == PLATFORMS
    assert donated(exported.mlir_module()) == list(range(len(jax.tree.leaves(here.state))))

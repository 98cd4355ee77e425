"""Models that others wrote and published, as they are, small enough for two cores.

Each is made by a function of its own, which imports its package only when it is called. A package that was written for
an older JAX gets back the one name that it misses; nothing else is changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import pathlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

EXAMPLES = "FLAX_EXAMPLES"  # the environment variable that names the folder of Flax's own examples


@dataclasses.dataclass(frozen=True)
class Example:
    """A model with a call of it.

    Attributes:
        model: Linen or NNX.
        inputs: By position.
        options: By name.
        mutable: Collections that a Linen model may write, None for those that `spp.propagate` would take.
    """

    model: Any
    inputs: tuple[Any, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mutable: Any = None


@dataclasses.dataclass(frozen=True)
class Network:
    """One of the models.

    Attributes:
        repository: Where it is published.
        package: By which pip knows it.
        make: The model with its call; ImportError where the package is not there.
    """

    repository: str
    package: str
    make: Callable[[], Example]


def images(size: int = 32, batch: int = 8) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (batch, size, size, 3))


def tokens(length: int = 32, vocabulary: int = 64, batch: int = 8) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (batch, length), 1, vocabulary)


# ---------------------------------------------------------------- Linen


def jax_resnet() -> Example:
    package = importlib.import_module("jax_resnet")
    model = package.ResNet(
        package.ResNetBlock,
        stage_sizes=[2, 2, 2, 2],
        hidden_sizes=(16, 32, 64, 128),
        n_classes=10,
        stem_cls=package.ResNetStem,
    )
    return Example(model, (images(),), mutable=["batch_stats"])


def jax_models_mixer() -> Example:
    package = importlib.import_module("jax_models.models.mlp_mixer")
    model = package.MLPMixer(
        patch_size=4, num_mixers_layers=6, hidden_size=64, channels_dim=128, tokens_dim=64, attach_head=True
    )
    return Example(model, (images(), True))


def jax_models_conv_mixer() -> Example:
    package = importlib.import_module("jax_models.models.conv_mixer")
    return Example(package.ConvMixer(features=32, patch_size=4, num_mixer_layers=6, filter_size=5), (images(), False))


def jax_models_cait() -> Example:
    package = importlib.import_module("jax_models.models.cait")
    return Example(package.CaiT(patch_size=8, embed_dim=48, depth=6, num_heads=4, num_classes=10), (images(), True))


def jax_models_convnext() -> Example:
    package = importlib.import_module("jax_models.models.convnext")
    return Example(package.ConvNeXt(depths=(2, 2, 4, 2), dims=(16, 32, 64, 128), num_classes=10), (images(), True))


def jax_models_swin() -> Example:
    package = importlib.import_module("jax_models.models.swin_transformer")
    model = package.SwinTransformer(
        patch_size=2, emb_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=10
    )
    return Example(model, (images(),), {"deterministic": True})


def flaim(module: str, name: str, **options: Any) -> Example:
    if not hasattr(jax.random, "KeyArray"):
        jax.random.KeyArray = jax.Array  # an annotation, of which newer versions of JAX have no more
    package = importlib.import_module(f"flaim.models.{module}")
    return Example(getattr(package, name)(**options), (images(),))


def nanodl_vit() -> Example:
    package = importlib.import_module("nanodl")
    model = package.ViT(
        patch_size=(8, 8), num_layers=6, hidden_dim=48, num_heads=4, feedforward_dim=48, dropout=0.0, n_outputs=10
    )
    return Example(model, (images(),), {"training": False})


def nanodl_decoder(name: str, **options: Any) -> Example:
    package = importlib.import_module("nanodl")
    sizes = {"num_layers": 6, "num_heads": 4, "hidden_dim": 48, "feedforward_dim": 96, "embed_dim": 48}
    words = {"vocab_size": 64, "max_length": 32, "start_token": 0, "end_token": 1}
    return Example(getattr(package, name)(dropout=0.0, **sizes, **words, **options), (tokens(),), {"training": False})


def nanodl_unet() -> Example:
    package = importlib.import_module("nanodl")
    model = package.UNet(
        image_size=(32, 32), widths=[16, 32, 48], block_depth=2, embed_dims=16, embed_min_freq=1.0, embed_max_freq=100.0
    )
    return Example(model, (images(), jnp.full((8, 1, 1, 1), 0.5)))


def flaxdiff_unet() -> Example:
    package = importlib.import_module("flaxdiff.models.simple_unet")
    model = package.Unet(
        emb_features=32, feature_depths=(16, 32, 48), attention_configs=(None, None, {"heads": 2}), num_res_blocks=2
    )
    return Example(model, (images(), jnp.linspace(0.1, 0.9, 8), jax.random.normal(jax.random.key(2), (8, 4, 32))))


def flaxdiff_dit() -> Example:
    package = importlib.import_module("flaxdiff.models.simple_dit")
    model = package.SimpleDiT(patch_size=4, emb_features=48, num_layers=6, num_heads=4)
    return Example(model, (images(), jnp.linspace(0.1, 0.9, 8), jax.random.normal(jax.random.key(2), (8, 4, 32))))


def griffin() -> Example:
    package, common = importlib.import_module("recurrentgemma.jax"), importlib.import_module("recurrentgemma.common")
    kinds = common.TemporalBlockType
    config = common.GriffinConfig(
        vocab_size=64,
        width=32,
        mlp_expanded_width=96,
        num_heads=4,
        block_types=(kinds.RECURRENT, kinds.RECURRENT, kinds.ATTENTION) * 2,
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=16,
        logits_soft_cap=30.0,
        scan_type=common.ScanType.LINEAR_NATIVE,
    )
    words = tokens(16)
    positions = jnp.broadcast_to(jnp.arange(16), words.shape)
    return Example(package.Griffin(config), (words, positions), {"return_cache": False})


def transformer_in_transformer() -> Example:
    package = importlib.import_module("transformer_in_transformer_flax.tnt")
    config = package.TNTConfig(
        num_classes=10,
        depth=4,
        image_size=32,
        patch_size=4,
        transformed_patch_size=2,
        inner_dim=12,
        inner_heads=2,
        inner_dim_head=8,
        outer_dim=48,
        outer_heads=4,
        outer_dim_head=12,
    )
    return Example(package.TransformerInTransformer(config), (images(),))


def nano_moe() -> Example:
    package = importlib.import_module("nano_moe")
    config = package.NanoMoEConfig(vocab_size=64, n_layers=4, n_heads=4, d_model=48, d_ff=96, block_size=32)
    return Example(package.NanoMoE(config), (tokens(),))


def flaxmodels_resnet() -> Example:
    package = importlib.import_module("flaxmodels.resnet.resnet")
    return Example(package.ResNet18(output="logits", pretrained=None, num_classes=10), (images(32, 4),))


def flax_resnet() -> Example:
    package = example("imagenet/models.py")
    model = package.ResNet(
        stage_sizes=[2, 2, 2, 2], block_cls=package.ResNetBlock, num_classes=10, num_filters=16, dtype=jnp.float32
    )
    return Example(model, (images(),), {"train": True})


def flax_lstm() -> Example:
    package = example("seq2seq/models.py")
    words = jax.nn.one_hot(tokens(12, 16), 16)
    return Example(package.Seq2seq(teacher_force=True, hidden_size=32, vocab_size=16), (words, words[:, :8]))


def flax_bilstm() -> Example:
    package = example("sst2/models.py")
    model = package.TextClassifier(
        embedding_size=32, hidden_size=32, vocab_size=64, output_size=2, dropout_rate=0.0, word_dropout_rate=0.0
    )
    return Example(model, (tokens(16), jnp.full((8,), 16)), {"deterministic": True})


def flax_lm1b() -> Example:
    package = example("lm1b/models.py")
    sizes = {"emb_dim": 48, "num_heads": 4, "num_layers": 4, "qkv_dim": 48, "mlp_dim": 96, "max_len": 32}
    config = package.TransformerConfig(vocab_size=64, output_vocab_size=64, deterministic=True, **sizes)
    return Example(package.TransformerLM(config), (tokens(),))


def flax_wmt() -> Example:
    package = example("wmt/models.py")
    sizes = {"emb_dim": 48, "num_heads": 4, "num_layers": 4, "qkv_dim": 48, "mlp_dim": 96, "max_len": 32}
    config = package.TransformerConfig(vocab_size=64, output_vocab_size=64, deterministic=True, **sizes)
    return Example(package.Transformer(config), (tokens(), tokens(24)))


def flax_vae() -> Example:
    package = example("vae/models.py")
    return Example(package.VAE(latents=16), (jax.random.normal(jax.random.key(1), (32, 784)), jax.random.key(2)))


# ---------------------------------------------------------------- NNX


def jaxnn_resnet() -> Example:
    package = jaxnn("models.resnet")
    sizes = {"stem_width": 16, "channels": (16, 32, 64, 128), "num_classes": 10, "zero_init_last": False}
    model = package.ResNet(package.BasicBlock, (2, 2, 2, 2), **sizes, rngs=nnx.Rngs(0))
    return Example(model, (images(),), {"training": True})


def jaxnn_vit() -> Example:
    package = jaxnn("models.vision_transformer")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 4, "num_classes": 10}
    return Example(package.VisionTransformer(**sizes, rngs=nnx.Rngs(0)), (images(),))


def jaxnn(module: str) -> types.ModuleType:
    """A module of jaxnn, of whose data loading, which wants torchvision, the models read only constants."""
    package = bare("jaxnn")
    package.__version__ = importlib.import_module("jaxnn.version").__version__
    bare("jaxnn.data")
    sys.modules["jaxnn.data"] = importlib.import_module("jaxnn.data.constants")
    return importlib.import_module(f"jaxnn.{module}")


def mamba2() -> Example:
    package = importlib.import_module("mamba2_jax.modeling")
    config = package.Mamba2Config(
        vocab_size=64, hidden_size=32, state_size=16, head_dim=16, chunk_size=16, num_hidden_layers=4
    )
    return Example(package.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)), (tokens(),))


def jraphx_gcn() -> Example:
    package = importlib.import_module("jraphx.nn.models")
    nodes = jax.random.normal(jax.random.key(1), (64, 16))
    edges = jax.random.randint(jax.random.key(2), (2, 256), 0, 64)
    return Example(package.GCN(16, 64, 5, 8, rngs=nnx.Rngs(0)), (nodes, edges))


def jraphx_sage_lstm() -> Example:
    package = importlib.import_module("jraphx.nn.models")
    nodes = jax.random.normal(jax.random.key(1), (64, 16))
    edges = jax.random.randint(jax.random.key(2), (2, 256), 0, 64)
    return Example(package.GraphSAGE(16, 32, 4, 8, jk="lstm", rngs=nnx.Rngs(0)), (nodes, edges))


def artifex_unet() -> Example:
    package = importlib.import_module("artifex.generative_models.models.backbones.unet")
    settings = importlib.import_module("artifex.generative_models.core.configuration.backbone_config")
    config = settings.UNetBackboneConfig(
        name="unet", hidden_dims=(16, 32), activation="silu", in_channels=3, out_channels=3, time_embedding_dim=32
    )
    return Example(package.UNet(config, rngs=nnx.Rngs(0)), (images(), jnp.arange(8)))


def artifex_dit() -> Example:
    package = importlib.import_module("artifex.generative_models.models.backbones.dit")
    model = package.DiffusionTransformer(
        img_size=16, patch_size=4, hidden_size=48, depth=6, num_heads=4, rngs=nnx.Rngs(0)
    )
    return Example(model, (images(16), jnp.linspace(0.1, 0.9, 8)), {"deterministic": True})


def dantinox() -> Example:
    package, settings = importlib.import_module("dantinox.core.model"), importlib.import_module("dantinox.core.config")
    config = settings.ModelConfig(dim=48, n_heads=4, num_blocks=6, vocab_size=64, max_context=32)
    return Example(package.Transformer(config, rngs=nnx.Rngs(0)), (tokens(),), {"deterministic": True})


def flax_gemma() -> Example:
    with path_of("gemma"):
        package = example("gemma/transformer.py")
        settings = importlib.import_module("transformer_cfg")
    config = settings.TransformerConfig(
        num_layers=6,
        num_embed=64,
        embed_dim=48,
        hidden_dim=96,
        num_heads=4,
        head_dim=12,
        num_kv_heads=1,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=settings.make_attention_layers_types(settings.GEMMA3_ATTENTION_PATTERN, 6),
        sliding_window_size=16,
    )
    words = tokens(16)
    positions = jnp.broadcast_to(jnp.arange(16), words.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((16, 16), bool)), (8, 16, 16))
    return Example(package.Transformer(config, rngs=nnx.Rngs(0)), (words, positions, None, mask))


# ---------------------------------------------------------------- where they come from


def bare(package: str) -> Any:
    """Imports a package without its `__init__`, which wants what no model needs (torchvision, a kernel library)."""
    if package in sys.modules:
        return sys.modules[package]
    parent = package.rpartition(".")[0]
    search = sys.modules[parent].__path__ if parent else None
    found = importlib.machinery.PathFinder.find_spec(package, search)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    sys.modules[package] = made = types.ModuleType(package)
    made.__path__ = list(found.submodule_search_locations)
    return made


def examples() -> pathlib.Path:
    """The folder of Flax's own examples; ImportError where none is named."""
    folder = os.environ.get(EXAMPLES)
    if not folder:
        raise ImportError("needs --flax-examples=DIR, the folder `examples` of Flax's source distribution")
    return pathlib.Path(folder)


def example(name: str) -> types.ModuleType:
    """A file of Flax's examples as a module."""
    path = examples() / name
    module = f"flax_examples_{name.removesuffix('.py').replace('/', '_')}"
    spec = importlib.util.spec_from_file_location(module, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ImportError(f"there is no {path}")
    sys.modules[module] = made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@contextlib.contextmanager
def path_of(name: str) -> Iterator[None]:
    """With an example's folder on the path, as when its main file is run."""
    folder = str(examples() / name)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _flaim(module: str, name: str, **options: Any) -> Network:
    return Network("bobmcdear/flaim", "flaim", functools.partial(flaim, module, name, **options))


def _nanodl(make: Callable[[], Example]) -> Network:
    return Network("HMUNACHI/nanodl", "nanodl", make)


def _jax_models(make: Callable[[], Example]) -> Network:
    return Network("DarshanDeshpande/jax-models", "jax-models", make)


def _flax(make: Callable[[], Example]) -> Network:
    return Network("google/flax", "flax", make)


NETWORKS: dict[str, Network] = {
    "jax-resnet ResNet": Network("n2cholas/jax-resnet", "jax-resnet", jax_resnet),
    "jax-models MLP-Mixer": _jax_models(jax_models_mixer),
    "jax-models ConvMixer": _jax_models(jax_models_conv_mixer),
    "jax-models CaiT": _jax_models(jax_models_cait),
    "jax-models ConvNeXt": _jax_models(jax_models_convnext),
    "jax-models Swin": _jax_models(jax_models_swin),
    "flaim ConvNeXt": _flaim("convnext", "ConvNeXt", depths=(2, 2, 4, 2), out_dims=(16, 32, 64, 128), n_classes=10),
    "flaim Swin": _flaim("swin", "Swin", depths=(2, 2), token_dim=24, n_heads=(2, 4), window_size=4, n_classes=10),
    "flaim ResNet": _flaim("resnet", "ResNet", depths=(1, 1, 1), dim_per_cardinal_first_stage=16, n_classes=10),
    "nanodl ViT": _nanodl(nanodl_vit),
    "nanodl GPT-3": _nanodl(functools.partial(nanodl_decoder, "GPT3")),
    "nanodl Llama 3": _nanodl(functools.partial(nanodl_decoder, "Llama3", num_groups=2)),
    "nanodl U-Net": _nanodl(nanodl_unet),
    "FlaxDiff U-Net": Network("AshishKumar4/FlaxDiff", "flaxdiff", flaxdiff_unet),
    "FlaxDiff DiT": Network("AshishKumar4/FlaxDiff", "flaxdiff", flaxdiff_dit),
    "recurrentgemma Griffin": Network("google-deepmind/recurrentgemma", "recurrentgemma", griffin),
    "TNT": Network(
        "NZ99/transformer-in-transformer-flax", "transformer-in-transformer-flax", transformer_in_transformer
    ),
    "NanoMoE": Network("carrycooldude/MoE-JAX", "nano-moe-jax", nano_moe),
    "flaxmodels ResNet-18": Network("matthias-wright/flaxmodels", "flaxmodels", flaxmodels_resnet),
    "Flax ResNet": _flax(flax_resnet),
    "Flax LSTM seq2seq": _flax(flax_lstm),
    "Flax BiLSTM": _flax(flax_bilstm),
    "Flax lm1b": _flax(flax_lm1b),
    "Flax WMT": _flax(flax_wmt),
    "Flax VAE": _flax(flax_vae),
    "jaxnn ResNet": Network("Xrenya/jaxnn", "jaxnn", jaxnn_resnet),
    "jaxnn ViT": Network("Xrenya/jaxnn", "jaxnn", jaxnn_vit),
    "Mamba-2": Network("jax-state-spaces/mamba2-jax", "mamba2-jax", mamba2),
    "JraphX GCN": Network("DBraun/jraphx", "jraphx", jraphx_gcn),
    "JraphX GraphSAGE LSTM": Network("DBraun/jraphx", "jraphx", jraphx_sage_lstm),
    "artifex U-Net": Network("avitai/artifex", "avitai-artifex", artifex_unet),
    "artifex DiT": Network("avitai/artifex", "avitai-artifex", artifex_dit),
    "dantinox": Network("winstonsmith1897/DantinoX", "dantinox", dantinox),
    "Flax Gemma 3": _flax(flax_gemma),
}

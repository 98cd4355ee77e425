"""Models that nobody here wrote, from published packages, measured as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfjax import spp
from nfjax.spp._monitor import COTANGENT, stream


@pytest.fixture(autouse=True)
def _usual_promotion():
    """Others' models rely on JAX's defaults."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_a_linen_resnet_with_batch_norm():
    jax_resnet = pytest.importorskip("jax_resnet")
    model = jax_resnet.ResNet(
        jax_resnet.ResNetBlock, stage_sizes=[2, 2], hidden_sizes=(8, 16), n_classes=10, stem_cls=jax_resnet.ResNetStem
    )
    x = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    variables = model.init(jax.random.key(0), x)
    # Blocks, not the ConvBlock that each of them calls two or three times.
    profile = spp.propagate(model, x, variables=variables, loss="cross_entropy")
    assert profile.paths == tuple(f"layers_{i}" for i in range(2, 6))
    assert [shape[-1] for shape in profile.shapes] == [8, 8, 16, 16]

    labels = jax.random.randint(stream(0, COTANGENT), (4,), 0, 10)
    taps = {}

    def until(index, start, stop):
        for layer, name in zip(model.layers[start:stop], range(start, stop), strict=True):
            inner = {kind: tree[f"layers_{name}"] for kind, tree in variables.items() if f"layers_{name}" in tree}
            index = layer.apply(inner, index) if hasattr(layer, "apply") else layer(index)
        return index

    for i, number in enumerate(range(2, 6)):
        taps[number] = until(x, 0, number + 1)

        def loss(y, number=number):
            scores = jax.nn.log_softmax(until(y, number + 1, len(model.layers)))
            return -jnp.take_along_axis(scores, labels[:, None], axis=-1).mean()

        gradient = np.asarray(jax.grad(loss)(taps[number]), np.float64)
        np.testing.assert_allclose(profile.forward_var[i], np.asarray(taps[number], np.float64).var(), rtol=1e-4)
        np.testing.assert_allclose(profile.backward_var[i], gradient.var(), rtol=1e-3)
    np.testing.assert_allclose(until(x, 0, len(model.layers)), model.apply(variables, x), rtol=1e-5, atol=1e-6)
    # This package trains batch norm where its statistics are mutable.
    trained = spp.propagate(model, x, variables=variables, where=jax_resnet.ResNetBlock, mutable=["batch_stats"])
    assert not np.allclose(trained.forward_var, profile.forward_var, rtol=0.1)


def test_an_nnx_state_space_model():
    """Its blocks return three arrays, the model a dictionary with None inside."""
    mamba = pytest.importorskip("mamba2_jax.modeling")
    settings = {"vocab_size": 64, "hidden_size": 16, "state_size": 8, "head_dim": 8, "chunk_size": 8}
    config = mamba.Mamba2Config(**settings, num_hidden_layers=3)
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 64)
    profile = spp.propagate_seeds(
        lambda seed: mamba.Mamba2ForCausalLM(config, rngs=nnx.Rngs(seed)), tokens, seeds=2, where=mamba.Mamba2Block
    )
    assert profile.paths == tuple(f"backbone/layers/{i}" for i in range(3))
    assert profile.shapes == ((2, 16, 16),) * 3
    model, seen = mamba.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)), []
    y = model.backbone.embedder(tokens)
    for block in model.backbone.layers:
        y = block(y)[0]
        seen.append(np.asarray(y, np.float64).var())
    np.testing.assert_allclose(profile.samples["forward_var"][0], seen, rtol=1e-5)
    assert profile.diagnose().backward.verdict in ("preserved", "exploding")

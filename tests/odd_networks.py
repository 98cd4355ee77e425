"""Networks that hold all that Flax lets them hold, for `test_extending`."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Kept(nnx.Variable):
    """A kind of variable of one's own."""


class Layer(nnx.Module):
    def __init__(self, width, rngs):
        self.dense = nnx.Linear(width, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.dense(x))


class Odd(nnx.Module):
    """Lists in lists, an array that is no variable, counters, a truth value, intermediate values, layers in one array,
    and what each device sees differently.
    """

    def __init__(self, num_classes, rngs, width=8):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def layers(rngs):
            return Layer(width, rngs)

        stages = [(3, width), (width, width)]
        self.stages = nnx.List(
            [nnx.List([nnx.Conv(i, o, (3, 3), strides=2, rngs=rngs), nnx.BatchNorm(o, rngs=rngs)]) for i, o in stages]
        )
        self.layers = layers(rngs)
        self.classifier = nnx.Linear(width, num_classes, rngs=rngs)
        self.shift = jnp.full((1, width), 0.5)
        self.calls = Kept(jnp.zeros((), jnp.int32))
        self.bright = Kept(jnp.zeros((), bool))
        self.largest = Kept(jnp.zeros((), jnp.int32))
        self.mean = Kept(jnp.zeros((width,)))
        self.training = nnx.Dropout(0.0)

    def __call__(self, images):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, layer):
            return layer(x)

        x = images
        for conv, norm in self.stages:
            x = nnx.relu(norm(conv(x)))
        x = x.mean((1, 2)) + self.shift
        self.features = nnx.Intermediate(x.mean())
        if not self.training.deterministic:
            self.calls[...] += 1
            self.bright[...] |= images.max() > 2
            self.largest[...] = jnp.maximum(self.largest[...], (jnp.abs(images).sum() * 100).astype(jnp.int32))
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * x.mean(0)
        return self.classifier(through(x, self.layers))


class Bfloat16(nnx.Module):
    """Parameters, arithmetic and logits in bfloat16."""

    def __init__(self, num_classes, rngs):
        types = {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}
        self.conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs, **types)
        self.classifier = nnx.Linear(8, num_classes, rngs=rngs, **types)

    def __call__(self, images):
        return self.classifier(nnx.relu(self.conv(images)).mean((1, 2)))


def check_devices_agree(run):
    """A callback: what is on each device is the same there."""
    for path, leaf in jax.tree_util.tree_leaves_with_path((run.state.params, run.state.batch_stats, run.state.ema)):
        first, *others = [np.asarray(part.data) for part in leaf.addressable_shards]
        for other in others:
            np.testing.assert_array_equal(first, other, err_msg=jax.tree_util.keystr(path))


def main(workdir):
    """Trains Odd on all devices there are."""
    from nfjax import config as configs
    from nfjax.training import loop

    config = configs.base()
    config.model.name, config.data.source, config.data.image_size = "odd_networks:Odd", "synthetic", 8
    config.batch_size, config.epochs, config.log.every_steps, config.optim.ema_decay = 64, 1, 5, 0.9
    config.augment.crop_padding, config.augment.rand_operations = 1, 0
    seen = []
    loop.train(config, workdir, more=[check_devices_agree, lambda run: seen.append(run.state.batch_stats)])
    assert int(seen[-1]["calls"]) == 16
    assert int(seen[-1]["largest"]) > 0
    print("devices", jax.device_count())


if __name__ == "__main__":
    main(sys.argv[1])

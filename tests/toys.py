"""What a user would add, each as few lines as it takes: `test_extending` trains with all of it."""

import json

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx

from nfjax import residual


class Network(nnx.Module):
    """A small network with a batch norm and a dropout."""

    def __init__(self, num_classes, width, rngs):
        self.conv = nnx.Conv(3, width, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.classifier = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, images):
        features = nnx.relu(self.norm(self.conv(images)))
        return self.classifier(self.dropout(features.mean((1, 2))))


def network(num_classes, rngs, width=8):
    return Network(num_classes, width, rngs)


class LinenNetwork(linen.Module):
    """The same in Linen."""

    num_classes: int
    width: int = 8

    @linen.compact
    def __call__(self, images, train=False):
        features = linen.Conv(self.width, (3, 3), strides=2)(images)
        features = linen.relu(linen.BatchNorm(use_running_average=not train)(features))
        return linen.Dense(self.num_classes)(linen.Dropout(0.1, deterministic=not train)(features.mean((1, 2))))


def sign_descent(learning_rate, weight_decay=0.0, mask=None):
    """An optimizer: the sign of the gradient (Bernstein et al. 2018), with a decoupled weight decay."""
    return optax.chain(
        optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates)),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def depth_scaled(position):
    """A rule: x + f(x) / sqrt(L), of L blocks."""
    return residual.Rule(b=position.num_blocks**-0.5)


def square_root(peak, epoch_ends):
    """A schedule: falls as a square root does, to zero."""
    return lambda step: peak * jnp.sqrt(1 - jnp.asarray(step, jnp.float32) / epoch_ends[-1])


def no_schedule(peak, epoch_ends):
    return lambda step: None


def stem_only(params):
    """A mask: only the kernels of the stem decay."""
    stem = set(map(id, jax.tree.leaves(params["stem"])))
    return jax.tree.map(lambda leaf: id(leaf) in stem, params)


class NoTracker:
    def __init__(self, folder, step, settings):
        pass


class Csv:
    """A tracker: the losses of the epochs as a table."""

    def __init__(self, folder, step, settings):
        self.file = (folder / "losses.csv").open("a" if step else "w")
        self.file.write(f"# {json.dumps(settings['optim']['name'])}\n")

    def write(self, kind, step, values):
        if kind == "epoch":
            self.file.write(f"{step},{values['test_loss']}\n")

    def close(self):
        self.file.close()

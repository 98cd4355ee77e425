"""Signal propagation: in which mode a network ran, and what its verdict says about that."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from nfjax import resnet, spp
from tests.conftest import TINY


def images(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


# ---------------------------------------------------------------- NNX


class Block(nnx.Module):
    def __init__(self, seed, norm=nnx.BatchNorm, rate=0.5):
        rngs = nnx.Rngs(seed)
        self.norm = norm(8, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.layer = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x, **norm_settings):
        return x + self.dropout(self.layer(jax.nn.relu(self.norm(x, **norm_settings))))


class Model(nnx.Module):
    def __init__(self, depth=3, **settings):
        self.blocks = nnx.List([Block(seed, **settings) for seed in range(depth)])

    def __call__(self, x, **norm_settings):
        for block in self.blocks:
            x = block(x, **norm_settings)
        return x


NORMS = tuple(f"blocks/{i}/norm" for i in range(3))
DROPOUTS = tuple(f"blocks/{i}/dropout" for i in range(3))


def trained(model, x):
    """With statistics of its own."""
    model.train()
    model(x)
    return model


def test_training_and_evaluation_mode_are_told_apart():
    model, x = Model(), images(16, 8)
    model.train()
    mode = spp.propagate(model, x).mode
    assert (mode.batch, mode.running, mode.initial) == (NORMS, (), ())
    assert (mode.dropout_on, mode.dropout_off) == (DROPOUTS, ())
    assert mode.random
    assert mode.mutable is None
    assert str(mode) == "batch statistics in 3 norms; dropout on in 3"
    model.eval()
    mode = spp.propagate(model, x).mode
    assert (mode.batch, mode.running, mode.initial) == ((), NORMS, NORMS)
    assert (mode.dropout_on, mode.dropout_off, mode.random) == ((), DROPOUTS, ())
    assert str(mode) == "running statistics in 3 norms, still initial; dropout off"


def test_arguments_of_the_call_go_before_attributes():
    model, x = Model(), images(16, 8)
    model.eval()
    assert spp.propagate(model, x, use_running_average=False).mode.batch == NORMS
    model.train()
    assert spp.propagate(model, x, use_running_average=True).mode.initial == NORMS

    class Quiet(Block):
        def __call__(self, x):
            return x + self.dropout(self.layer(x), deterministic=True)

    model.blocks = nnx.List([Quiet(0), Quiet(1)])
    mode = spp.propagate(model, x).mode
    assert mode.dropout_off == DROPOUTS[:2]
    assert (mode.batch, mode.running) == ((), ())  # norms that are not called


def test_statistics_that_are_no_longer_initial():
    x = images(16, 8) * 3 + 1
    model = trained(Model(), x)
    model.eval()
    profile = spp.propagate(model, x)
    assert (profile.mode.running, profile.mode.initial) == (NORMS, ())
    assert profile.diagnose().notes == ()
    norm = model.blocks[1].norm
    norm.mean[...], norm.var[...] = jnp.zeros(8), jnp.ones(8)
    profile = spp.propagate(model, x)
    assert profile.mode.initial == NORMS[1:2]
    assert "running statistics in 3 norms, 1 of them still initial" in str(profile.mode)
    assert "1 of 3 norms ran on running statistics that are still initial" in profile.diagnose().notes[0]


def test_one_norm_frozen_among_others():
    model, x = Model(), images(16, 8)
    model.train()
    model.blocks[2].norm.use_running_average = True
    mode = spp.propagate(model, x).mode
    assert (mode.batch, mode.running) == (NORMS[:2], NORMS[2:])
    assert str(mode).startswith("batch statistics in 2 norms; running statistics in 1 norm, still initial")


class Centred(nnx.Module):
    """A norm of somebody else's, with names of its own."""

    def __init__(self, width, *, rngs):
        self.moving_mean = nnx.BatchStat(jnp.zeros(width))
        self.moving_variance = nnx.BatchStat(jnp.ones(width))
        self.training = True

    def __call__(self, x):
        if not self.training:
            return (x - self.moving_mean[...]) / jnp.sqrt(self.moving_variance[...])
        mean, variance = x.mean(0), x.var(0)
        self.moving_mean[...] = 0.9 * self.moving_mean[...] + 0.1 * mean
        self.moving_variance[...] = 0.9 * self.moving_variance[...] + 0.1 * variance
        return (x - mean) / jnp.sqrt(variance)


class Heir(nnx.BatchNorm):
    """A subclass with another `__call__`."""

    def __call__(self, x, **settings):
        return 2 * super().__call__(x, **settings)


@pytest.mark.parametrize("norm", [Centred, Heir])
def test_norms_that_are_not_flaxs_own(norm):
    with jax.numpy_rank_promotion("allow"):
        model, x = Model(norm=norm), images(16, 8)
        mode = spp.propagate(model, x).mode
        assert (mode.batch, mode.running) == (NORMS, ())
        model.eval()
        for block in model.blocks:
            block.norm.training = False
        mode = spp.propagate(model, x).mode
        assert (mode.batch, mode.running, mode.initial) == ((), NORMS, NORMS)


@pytest.mark.parametrize("training", [True, False])
def test_norms_inside_remat_and_scan(training):
    """Their statistics travel through the loop beside the signal."""

    class Scanned(nnx.Module):
        def __init__(self):
            states = [nnx.split(Block(seed, rate=0.0)) for seed in range(3)]
            self.layers = nnx.merge(states[0][0], jax.tree.map(lambda *s: jnp.stack(s), *(s for _, s in states)))

        def __call__(self, x):
            run = nnx.remat(lambda x, block: block(x))
            return nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    model = Scanned()
    model.train() if training else model.eval()
    mode = spp.propagate(model, images(16, 8), where=Block).mode
    assert (mode.batch, mode.running) == (("layers/norm",), ())[:: 1 if training else -1]
    assert mode.initial == (() if training else ("layers/norm",))
    assert mode.dropout_on == mode.dropout_off == ()  # the rate is 0


def test_our_own_networks(monkeypatch):
    x, settings = images(4, 8, 8, 3), {"width": 4, "image_size": 8}
    model = resnet.PreActResNet(TINY, "identity", "batch", rngs=nnx.Rngs(0), **settings)
    assert str(spp.propagate(model, x).mode) == "batch statistics in 9 norms"
    model.eval()
    profile = spp.propagate(model, x)
    assert len(profile.mode.initial) == 9
    assert "blocks/0/branch/activations/0/norm" in profile.mode.running
    (note,) = profile.diagnose().notes
    assert "9 of 9 norms ran on running statistics that are still initial (mean 0, variance 1)" in note
    assert "call model.train() first" in note
    assert str(profile.diagnose()).endswith(f"note: {note}")
    plain = spp.propagate(resnet.PreActResNet(TINY, "idshort", rngs=nnx.Rngs(0), **settings), x)
    assert str(plain.mode) == ""
    assert plain.diagnose().notes == ()
    diagnosis = plain.diagnose()
    causes = [f"cause: {cause}" for cause in diagnosis.causes]
    assert str(diagnosis) == "\n".join([str(diagnosis.forward), str(diagnosis.backward), *causes])


def test_seeds_of_which_one_is_trained():
    x = images(16, 8)

    def make(seed):
        model = trained(Model(), x) if seed else Model()
        model.eval()
        return model

    profile = spp.propagate_seeds(make, x, seeds=2)
    assert profile.mode.initial == NORMS


def test_a_monitor_sees_what_training_changed():
    x, model = images(16, 8), Model()
    monitor = spp.Monitor(x)
    model.eval()
    assert monitor(model).mode.initial == NORMS
    trained(model, x).eval()
    measurement = monitor._prepared
    assert monitor(model).mode.initial == ()
    assert monitor._prepared is measurement
    model.train()
    assert monitor(model).mode.batch == NORMS


def test_the_mode_is_written_and_shown(tmp_path):
    model = Model()
    model.eval()
    profile = spp.propagate(model, images(16, 8))
    text = "running statistics in 3 norms, still initial; dropout off"
    assert repr(profile).splitlines()[1] == text
    assert f"\nmeasured with {text}\n" in str(profile.diagnose())
    profile.to_csv(tmp_path / "p.csv")
    assert {row["mode"] for row in csv.DictReader((tmp_path / "p.csv").read_text().splitlines())} == {text}
    written = json.loads(profile.to_json())["mode"]
    assert written["text"] == text
    assert tuple(written["initial"]) == NORMS


# ---------------------------------------------------------------- Linen


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        y = linen.BatchNorm(use_running_average=not train, name="norm")(x)
        y = linen.Dropout(0.5, deterministic=not train, name="dropout")(linen.Dense(8)(y))
        return x + y


class LinenModel(linen.Module):
    """The argument decides the mode, or, where it is None, whether statistics are mutable."""

    @linen.compact
    def __call__(self, x, train=None):
        train = self.is_mutable_collection("batch_stats") if train is None else train
        for i in range(2):
            x = LinenBlock(name=f"block{i}")(x, train)
        return x


LINEN_NORMS = ("block0/norm", "block1/norm")


@pytest.fixture(scope="module")
def linen_variables():
    return LinenModel().init(jax.random.key(0), images(16, 8), False)


@pytest.mark.parametrize("train", [True, False])
def test_linen_by_argument(linen_variables, train):
    profile = spp.propagate(LinenModel(), images(16, 8), variables=linen_variables, where=LinenBlock, train=train)
    mode, dropouts = profile.mode, ("block0/dropout", "block1/dropout")
    assert (mode.batch, mode.running) == (LINEN_NORMS, ())[:: 1 if train else -1]
    assert (mode.dropout_on, mode.dropout_off) == (dropouts, ())[:: 1 if train else -1]
    assert mode.random == (("params",) if train else ())  # Linen's stream where none is given for dropout
    assert mode.mutable == ("all but params" if train else "none")
    assert not mode.mutable_decides
    notes = profile.diagnose().notes
    assert not notes if train else "such as train=True" in notes[0]


def test_linen_by_what_is_mutable(linen_variables):
    """The way of models that ask whether their statistics are mutable."""
    settings = {"variables": linen_variables, "where": LinenBlock, "rngs": {"dropout": jax.random.key(1)}}
    profile = spp.propagate(LinenModel(), images(16, 8), **settings)
    assert (profile.mode.running, profile.mode.mutable, profile.mode.mutable_decides) == (LINEN_NORMS, "none", True)
    assert "mutable: none, which decides" in str(profile.mode)
    assert 'pass mutable=["batch_stats"], which decides' in profile.diagnose().notes[0]
    trains = spp.propagate(LinenModel(), images(16, 8), mutable=["batch_stats"], **settings)
    assert (trains.mode.batch, trains.mode.mutable, trains.mode.mutable_decides) == (LINEN_NORMS, "batch_stats", True)
    assert trains.mode.random == ("dropout",)
    assert trains.diagnose().notes == ()
    assert trains.forward_var[0] != profile.forward_var[0]


def test_linen_scan_and_attributes():
    class Body(linen.Module):
        use_running_average: bool

        @linen.compact
        def __call__(self, x, _):
            norm = linen.BatchNorm(self.use_running_average, name="norm")
            return x + linen.Dense(8)(norm(x)), None

    class Net(linen.Module):
        use_running_average: bool

        @linen.compact
        def __call__(self, x):
            axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
            return linen.scan(Body, length=3, **axes)(self.use_running_average, name="layers")(x, None)[0]

    for running in (True, False):
        mode = spp.propagate(Net(running), images(16, 8), where=Body).mode
        assert (mode.running if running else mode.batch) == ("layers/norm",)
        assert (mode.batch if running else mode.running) == ()
        assert mode.initial == (("layers/norm",) if running else ())


def test_a_linen_norm_of_somebody_elses():
    class Norm(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            mean = self.variable("batch_stats", "ema_mean", jnp.zeros, (8,))
            if not train:
                return x - mean.value[None]
            if not self.is_initializing():
                mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
            return x - x.mean(0, keepdims=True)

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            for _ in range(2):
                x = linen.Dense(8)(Norm()(x, train))
            return x

    for train in (True, False):
        mode = spp.propagate(Net(), images(16, 8), train, where=linen.Dense).mode
        assert (mode.batch if train else mode.initial) == ("Norm_0", "Norm_1")


def test_a_linen_module_inside_an_nnx_model():
    class Net(nnx.Module):
        def __init__(self):
            module = nnx.bridge.ToNNX(linen.BatchNorm(use_running_average=True), nnx.Rngs(0))
            self.norm = nnx.bridge.lazy_init(module, jnp.ones((1, 8)))
            self.blocks = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2)])

        def __call__(self, x):
            x = self.norm(x)
            for block in self.blocks:
                x = block(x)
            return x

    mode = spp.propagate(Net(), images(16, 8), where=nnx.Linear).mode
    assert mode.running == mode.initial == ("norm",)
    assert mode.mutable is None


def test_dropout_of_attention():
    """A module that is not called Dropout, with a rate of its own."""
    x = images(2, 4, 8)
    layers = [
        nnx.MultiHeadAttention(2, 8, dropout_rate=0.1, decode=False, deterministic=on, rngs=nnx.Rngs(i))
        for i, on in enumerate((True, False))
    ]
    mode = spp.propagate(nnx.Sequential(*layers), x, where=nnx.MultiHeadAttention).mode
    assert mode.dropout_off == ("layers/0",)
    assert mode.dropout_on == ("layers/1",)


def test_random_numbers_of_no_dropout():
    class Noisy(nnx.Module):
        def __init__(self):
            self.rngs = nnx.Rngs(noise=0)

        def __call__(self, x):
            return x + self.rngs.noise.normal(x.shape)

    profile = spp.propagate(nnx.Sequential(Noisy(), Noisy()), images(16, 8), where=Noisy)
    assert len(profile.mode.random) == 2
    assert str(profile.mode) == "random numbers drawn"
    np.testing.assert_allclose(profile.backward_var, profile.backward_var[-1], rtol=1e-6)

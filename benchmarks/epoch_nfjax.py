"""nfjax's side of epoch.py, which starts it: the trainer's own loop over an epoch, the images on the device."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
import turns
from speed_nfjax import machine

from nfjax import compilation, config, data, preemption
from nfjax.training import assembly
from nfjax.training import loop as train
from nfjax.training import sharding as meshes
from nfjax.training import step as steps

EPOCHS = 200  # of the schedule; more than are measured


class Training:
    def prepare(self, images: str, depth: int, residual: str, norm: str | None, batch: int, **rest: Any) -> dict:
        """Builds everything up to the first step. images: an .npz file with `images` and `labels`."""
        settings = config.cifar()
        settings.model.depth, settings.model.residual, settings.model.norm = depth, residual, norm
        settings.model.dtype, settings.model.width = rest["dtype"], rest["width"]
        settings.batch_size, settings.augment.rand_operations = batch, rest["operations"]
        self.batch, self.every = batch, settings.log.every_steps
        with np.load(images) as arrays:
            split = data.Images(arrays["images"], arrays["labels"])
        dataset = data.Dataset(split, split, tuple(map(str, range(10))))
        mesh = meshes.make()
        model = assembly.build_model(settings, 10, jax.random.key(0))
        network, params, batch_stats = steps.as_functions(model)
        self.per_epoch = len(split) // batch
        ends = self.per_epoch * np.arange(1, EPOCHS + 1)
        optimizer, _ = assembly.build_optimizer(settings, ends)
        state = steps.initial_state(params, batch_stats, optimizer)
        self.state, self.step = meshes.place(state, meshes.of_state(state, mesh)), 0
        feed = assembly.make_feed(settings, dataset, "train", mesh, None)
        step = train.make_train_step(settings, network, optimizer, mesh)
        votes = preemption.Votes(mesh, lambda: False)
        self.runner = train.Runner(settings, feed, step, jax.random.key(1), votes, len(split), int(ends[-1]))
        return machine()

    def epoch(self) -> dict[str, float]:
        """Seconds and mean loss of an epoch, reported as often as the trainer does."""
        start, losses, end = time.perf_counter(), [], self.step + self.per_epoch
        while self.step < end:
            stop = min(end, (self.step // self.every + 1) * self.every)
            parts = []
            for state, sums in self.runner.steps(self.state, self.step, stop):
                self.state = state
                parts.append(sums)
            losses.append(steps.fetch(parts)["loss"])
            self.step = stop
        return {"seconds": time.perf_counter() - start, "loss": float(np.concatenate(losses).mean()) / self.batch}


if __name__ == "__main__":
    compilation.keep()
    training = Training()
    turns.serve({"prepare": training.prepare, "epoch": training.epoch})

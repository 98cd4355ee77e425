"""The two ways in which batches reach a step: gathered from images that lie on the device, or sent from the host, made
while the device is at work.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nfjax.data import Images, Order
from nfjax.training import sharding as meshes
from nfjax.training.step import Batch, State, Step, Sums

HostBatch = dict[str, np.ndarray]
Item = dict[str, Any]  # what `items` yields and the function of `each` takes
OnCompiled = Callable[[jax.stages.Compiled], None]


def _never() -> bool:
    return False


def _ignore(compiled: jax.stages.Compiled) -> None:
    del compiled


class _Compiled:
    """A jitted function, compiled for the shapes of its first call and shown before it runs."""

    def __init__(self, jitted: Any, on_compiled: OnCompiled):
        self._jitted, self._on_compiled = jitted, on_compiled
        self._compiled: jax.stages.Compiled | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is None:
            self._compiled = self._jitted.lower(*arguments).compile()
            self._on_compiled(self._compiled)
        return self._compiled(*arguments)


class OnDevice:
    """Images of one split in the device's memory, from which batches are taken by index."""

    waited = 0.0  # seconds: nothing is ever waited for

    def __init__(self, split: Images, mesh: Mesh):
        self.by_batch = meshes.by_batch(mesh)
        self.split = meshes.place({"image": split.images, "label": split.labels}, meshes.replicated(mesh))

    def items(self, orders: Iterator[Order], idle: Callable[[], bool] = _never) -> Iterator[Item]:
        """One item per batch, for `each`."""
        del idle  # there is nothing to wait for
        for order in orders:
            yield {"indices": order.indices, "mask": order.mask}

    def each(self, step: Step, donate: bool, on_compiled: OnCompiled = _ignore) -> Callable[..., Any]:
        """`call(state, item, **rest)`: one step per dispatch; rest completes the batch. donate: the state's memory is
        reused. on_compiled is called with the program before it runs for the first time.
        """

        def gathered(state: State, split: Any, item: Item, rest: Any) -> Any:
            return step(state, self._gather(split, item["indices"]) | {"mask": item["mask"]} | rest)

        compiled = _Compiled(jax.jit(gathered, donate_argnums=0 if donate else ()), on_compiled)
        return lambda state, item, **rest: compiled(state, self.split, item, rest)

    def many(self, step: Step, length: int, on_compiled: OnCompiled = _ignore) -> Callable[..., tuple[State, Sums]]:
        """`call(state, indices [n, B], first_step, **rest)`: n <= length training steps in one dispatch, the sums of
        each stacked to [n]; rest is added to every batch.

        n is an argument of the compiled loop, so that epochs of unequal length do not compile again.
        """

        def loop(
            state: State, split: Any, indices: jax.Array, first_step: jax.Array, n: jax.Array, rest: Item
        ) -> tuple[State, Sums]:
            mask = jnp.ones(indices.shape[1], jnp.float32)

            def at(state: State, i: Any) -> tuple[State, Sums]:
                batch = self._gather(split, indices[i]) | {"mask": mask, "step": first_step + i} | rest
                return step(state, batch)

            _, shapes = jax.eval_shape(at, state, 0)
            stacked = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), shapes)

            def body(i: jax.Array, carry: tuple[State, Sums]) -> tuple[State, Sums]:
                state, sums = at(carry[0], i)
                return state, jax.tree.map(lambda all, one: all.at[i].set(one), carry[1], sums)

            return jax.lax.fori_loop(0, n, body, (state, stacked))

        compiled = _Compiled(jax.jit(loop, donate_argnums=0), on_compiled)

        def call(state: State, indices: np.ndarray, first_step: int, **rest: Any) -> tuple[State, Sums]:
            n = len(indices)
            padded = np.zeros((length, indices.shape[1]), np.int32)
            padded[:n] = indices
            state, stacked = compiled(state, self.split, padded, np.int32(first_step), np.int32(n), rest)
            return state, {name: x[:n] for name, x in jax.device_get(stacked).items()}

        return call

    def _gather(self, split: Any, indices: jax.Array) -> Batch:
        return jax.lax.with_sharding_constraint({name: x[indices] for name, x in split.items()}, self.by_batch)

    def close(self) -> None:
        """Nothing is open."""


def taken(split: Images) -> Callable[[Iterator[Order]], Iterator[HostBatch]]:
    """Makes host batches of images in the host's memory."""
    return lambda orders: (split.take(order.indices) | {"mask": order.mask} for order in orders)


class FromHost:
    """Batches made by `make(orders)` on the host, in a thread of their own, and sent to the devices ahead of their use.

    waited: seconds for which nothing was left to do for the device because a batch was not there yet.
    """

    def __init__(self, make: Callable[[Iterator[Order]], Iterator[HostBatch]], mesh: Mesh):
        self.make, self.by_batch = make, meshes.by_batch(mesh)
        self.waited = 0.0
        self._open: list[_Prefetch] = []

    def items(self, orders: Iterator[Order], idle: Callable[[], bool] = _never) -> Iterator[Item]:
        """One item per batch, for `each`. idle() tells whether the device has finished what it was given."""
        prefetch = _Prefetch(self.make(self._shares(orders)), self._send)
        self._open.append(prefetch)
        try:
            while True:
                start = time.perf_counter()
                while (item := prefetch.get(timeout=0.002)) is None:
                    now = time.perf_counter()
                    if idle():
                        self.waited += now - start
                    start = now
                if item is _Prefetch.END:
                    return
                yield item
        finally:
            prefetch.close()
            self._open.remove(prefetch)

    def each(self, step: Step, donate: bool, on_compiled: OnCompiled = _ignore) -> Callable[..., Any]:
        """`call(state, item, **rest)`: one step; rest completes the batch. donate: the state's memory is reused.
        on_compiled is called with the program before it runs for the first time.
        """
        jitted = jax.jit(lambda state, batch: step(state, batch), donate_argnums=0 if donate else ())
        compiled = _Compiled(jitted, on_compiled)
        return lambda state, item, **rest: compiled(state, item | rest)

    def _shares(self, orders: Iterator[Order]) -> Iterator[Order]:
        for order in orders:
            yield order.take(meshes.local_rows(self.by_batch, len(order.indices)))

    def _send(self, batch: HostBatch) -> Item:
        size = len(batch["mask"]) * jax.process_count()  # every process has as many devices
        return {name: meshes.from_local(self.by_batch, x, size) for name, x in batch.items()}

    def close(self) -> None:
        """Ends the threads, and the worker processes behind them."""
        for prefetch in list(self._open):
            prefetch.close()


class _Prefetch:
    """Runs an iterator in a thread, `ahead` results before they are asked for."""

    END = object()

    def __init__(self, batches: Iterator[HostBatch], send: Callable[[HostBatch], Item], ahead: int = 1):
        self._batches, self._send = batches, send
        self._queue: queue.Queue[Any] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nfjax-prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for batch in self._batches:
                if not self._put(self._send(batch)):
                    break
            else:
                self._put(self.END)
        except BaseException as error:
            self._put(error)
        finally:
            if hasattr(self._batches, "close"):
                self._batches.close()  # here, because a generator may only be closed where it does not run

    def _put(self, value: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def get(self, timeout: float) -> Any:
        """The next result, END after the last, None if there is none yet; raises what the iterator raised."""
        try:
            value = self._queue.get(timeout=timeout)
        except queue.Empty:
            if self._thread.is_alive() or not self._queue.empty():
                return None
            raise RuntimeError("the thread that makes batches has ended") from None
        if isinstance(value, BaseException):
            raise value
        return value

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()

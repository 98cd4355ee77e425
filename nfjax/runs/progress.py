"""What a person sees of a run: the bar, and lines above it."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Mapping
from typing import Any, TextIO

import tqdm
from absl import logging

from nfjax import _streams as streams
from nfjax import distributed


def say(text: str) -> None:
    """A line for a person, from the first process only."""
    if distributed.is_first():
        _print(text, streams.out())


_drawn: list[tqdm.tqdm] = []  # the bar that is on the terminal, if there is one


def _print(text: str, stream: Any) -> None:
    """A line, above the bar. `tqdm.write` knows only bars on the very stream that it writes to."""
    for bar in _drawn:
        bar.clear()
    print(text, file=stream, flush=True)
    for bar in _drawn:
        bar.refresh()


def _columns() -> int:
    """Of the terminal that the bar is on; 0 where it does not tell."""
    try:
        return os.get_terminal_size(streams.err().fileno()).columns
    except (OSError, ValueError, AttributeError):
        return 0


class _AboveBar(io.TextIOBase):
    """A stream that prints whole lines to `stream`, above the bar there."""

    def __init__(self, stream: TextIO):
        self._stream, self._started = stream, ""

    def write(self, text: str) -> int:
        *lines, self._started = (self._started + text).split("\n")
        for line in lines:
            _print(line, self._stream)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def finish(self) -> None:
        """Prints what is left of a last line."""
        if self._started:
            self.write("\n")


class Bar:
    """A progress bar with epoch, loss, accuracy, images/s and time left, and one line per epoch; without a terminal
    only the lines. In all but the first process it only counts.

    Attributes:
        rate: Images per second since the last report, compilation included.
        overall_rate: Likewise, since the bar was made.
        seconds: Since the last report.
    """

    def __init__(self, first: int, total: int, batch_size: int, epochs: int):
        """Draws nothing yet.

        Args:
            first: Step at which the run goes on.
            total: Steps of the whole run.
            batch_size: Images of a step.
            epochs: Of the whole run.
        """
        self.silent = not distributed.is_first()
        self.batch_size, self.epochs = batch_size, epochs
        self._first = first * epochs // total + 1  # epoch
        self.tqdm = tqdm.tqdm(
            total=total,
            initial=first,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining} left{postfix}",  # at most 80 columns
            disable=self.silent or None,  # None: shown only on a terminal
            dynamic_ncols=_columns() > 0,
            ncols=None if _columns() else 80,
            leave=False,
            file=streams.err(),
        )
        self.rate = self.overall_rate = self.seconds = 0.0
        self._pending, self._since = 0, time.perf_counter()
        self._steps, self._seconds = 0, 0.0

    def __enter__(self) -> Bar:
        self.tqdm.set_description_str(f"epoch {min(self._first, self.epochs)}/{self.epochs}")
        self._above = contextlib.ExitStack()
        if not self.tqdm.disable:  # warnings and the log go where the bar is
            _drawn.append(self.tqdm)
            self._above.callback(_drawn.remove, self.tqdm)
            above, handler = _AboveBar(streams.err()), logging.get_absl_handler().python_handler
            self._above.callback(above.finish)
            self._above.enter_context(contextlib.redirect_stderr(above))
            self._above.callback(handler.setStream, handler.stream)
            handler.setStream(above)
        self._since = time.perf_counter()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.tqdm.close()
        self._above.close()

    def advance(self, steps: int) -> None:
        """Steps that were dispatched."""
        self._pending += steps
        self.tqdm.update(steps)

    def settle(self) -> None:
        """The device is done with all dispatched steps: sets `seconds` since the last report and `rate`, in images/s,
        compilation included.
        """
        self.seconds = time.perf_counter() - self._since
        self._steps, self._seconds = self._steps + self._pending, self._seconds + self.seconds
        self.rate = self._pending * self.batch_size / self.seconds
        self.overall_rate = self._steps * self.batch_size / self._seconds
        self._pending = 0

    def show(self, values: Mapping[str, float]) -> None:
        """Puts the numbers of the last interval behind the bar."""
        self.tqdm.set_description_str(
            f"epoch {min(int(values['epoch']) + 1, self.epochs)}/{self.epochs}", refresh=False
        )
        self.tqdm.set_postfix_str(
            f"loss {values['loss']:.3f} acc {values['accuracy']:.1%} {self.rate:,.0f} img/s"
            + (f" wait {values['data_wait']:.0%}" if values["data_wait"] >= 0.05 else "")  # for data
        )
        self._since = time.perf_counter()

    def line(self, values: Mapping[str, float]) -> None:
        """One line for an epoch that was scored."""
        if self.silent:
            return
        width = len(str(self.epochs))
        average = f" (average {values['test_ema_accuracy']:.2%})" if "test_ema_accuracy" in values else ""
        _print(
            f"epoch {values['epoch']:{width}d}/{self.epochs}  train loss {values['train_loss']:.4f} accuracy "
            f"{values['train_accuracy']:7.2%}   "
            f"test loss {values['test_loss']:.4f} accuracy {values['test_accuracy']:7.2%}{average}   "
            f"{self.rate:,.0f} images/s",
            streams.out(),
        )
        self._since = time.perf_counter()

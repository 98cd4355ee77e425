"""Processes that live through a measurement and are asked by turns: a request and an answer are a line of JSON each.

    PYTHON -m benchmarks.turns SIDE MEASURE [OPTIONS]

serves `benchmarks.sides.SIDE.MEASURES[MEASURE](OPTIONS)`. Nothing but the standard library is imported here, so that
the interpreters of all sides can use it.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
PAUSE = 0.3  # seconds between two turns, in which the threads of the side that was just at work fall asleep
PATIENCE = 60  # seconds in which a process has to end that is told to


class LostError(RuntimeError):
    """The process has ended or gives no answer: it ran out of memory, or was not what it was taken for."""


class TimeOverError(RuntimeError):
    """The time of the command has ended before the answer came."""


# Both libraries see one accelerator: the other side uses one as well.
ONE_DEVICE = {
    name: os.environ.get(name, "0").partition(",")[0] for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
}


def check_same_device(machines: dict[str, dict[str, Any]]) -> None:
    """Ends the program where one of the interpreters does not see the accelerator that the other has.

    Args:
        machines: {side: {"platform": "cpu", ...}}.
    """
    on_cpu = [name for name, machine in machines.items() if machine["platform"] == "cpu"]
    if on_cpu and len(on_cpu) < len(machines):
        others = [name for name in machines if name not in on_cpu]
        sys.exit(f"{', '.join(on_cpu)} sees no accelerator, while {', '.join(others)} does: nothing is compared")


class Worker:
    """The other end of a process that calls `serve`.

    Args:
        command: what to start.
        environment: variables beside those of this process, None for one that is to be left out.
        pause: seconds of silence after each answer.
        deadline: by `time.monotonic`, until which it may answer.
    """

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str | None] | None = None,
        pause: float | None = None,
        deadline: float | None = None,
    ):
        self._pause, self._deadline = PAUSE if pause is None else pause, deadline
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        variables = os.environ | paths | (environment or {})
        try:
            # A session of its own: what some libraries start outlives them, and is then ended with it.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={name: value for name, value in variables.items() if value is not None},
                start_new_session=True,
            )
        except OSError as error:
            sys.exit(f"{command[0]} cannot be started: {error.strerror}")

    def ask(self, do: str, **request: Any) -> Any:
        """The answer.

        Raises:
            LostError: says why there is none.
            TimeOverError: the deadline has come; the process is ended.
        """
        try:
            self._process.stdin.write(json.dumps({"do": do} | request) + "\n")
            self._process.stdin.flush()
            self._await_answer()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise LostError(f"ended with {self._wait(PATIENCE)}")
        try:
            answer = json.loads(line)
        except json.JSONDecodeError as error:
            raise LostError(f"answered {line.strip()[:100]!r}") from error
        if "error" in answer:
            raise LostError(answer["error"])
        time.sleep(self._pause)
        return answer["answer"]

    def _await_answer(self) -> None:
        if self._deadline is None:
            return
        left = max(0.0, self._deadline - time.monotonic())
        if not select.select([self._process.stdout], [], [], left)[0]:
            self._process.kill()  # it would not hear that it is to end before its answer is there
            raise TimeOverError

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # Where the time is over or a person has lost patience, nobody waits for an answer.
        self.close(0 if kind in (TimeOverError, KeyboardInterrupt) else PATIENCE)

    def close(self, patience: float = PATIENCE) -> None:
        """Lets the process end, for `patience` seconds, and ends what is left of it and of what it has started."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, and what was to be told it has not been read
            self._process.stdin.close()
        self._process.stdout.close()
        self._wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _wait(self, patience: float) -> int:
        """The exit status."""
        try:
            return self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def serve(functions: dict[str, Callable[..., Any]]) -> None:
    """Answers requests from the standard input by these functions until it ends. What they print goes to the standard
    error, also where a library in C or a child process does.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": functions[request.pop("do")](**request)}
        except Exception as error:  # such as a lack of memory, of which each library has a type of its own
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


def forget_peak() -> None:
    """The process' largest memory is counted from here, where the system allows it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def peak() -> int | None:
    """The process' largest memory in bytes; None where nobody tells."""
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def main() -> None:
    side, measure, *options = sys.argv[1:]
    start = time.perf_counter()
    module = importlib.import_module(f"benchmarks.sides.{side}")
    seconds = time.perf_counter() - start
    functions = dict(inspect.getmembers(module.MEASURES[measure](*options), inspect.ismethod))
    serve(functions | {"machine": module.machine, "import_seconds": lambda: seconds})


if __name__ == "__main__":
    main()

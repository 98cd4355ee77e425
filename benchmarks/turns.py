"""Processes that live through a measurement and are asked by turns: a request and an answer are a line of JSON each.

Nothing but the standard library is imported, so that the interpreters of all sides can use it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

PAUSE = 0.3  # seconds between two turns, in which the threads of the side that was just at work fall asleep


class LostError(RuntimeError):
    """The process has ended or gives no answer: it ran out of memory, or was not what it was taken for."""


# Both libraries see one accelerator: the other side uses one as well.
ONE_DEVICE = {
    name: os.environ.get(name, "0").partition(",")[0] for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
}


def check_same_device(machines: dict[str, dict[str, Any]]) -> None:
    """Ends the program where one of the interpreters does not see the accelerator that the other has.

    machines: {side: {"platform": "cpu", ...}}.
    """
    on_cpu = [name for name, machine in machines.items() if machine["platform"] == "cpu"]
    if on_cpu and len(on_cpu) < len(machines):
        others = [name for name in machines if name not in on_cpu]
        sys.exit(f"{', '.join(on_cpu)} sees no accelerator, while {', '.join(others)} does: nothing is compared")


class Worker:
    """The other end of a process that calls `serve`."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None):
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | (environment or {})
            )
        except OSError as error:
            sys.exit(f"{command[0]} cannot be started: {error.strerror}")

    def ask(self, do: str, **request: Any) -> Any:
        """The answer; raises LostError that says why where there is none."""
        try:
            self._process.stdin.write(json.dumps({"do": do} | request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise LostError(f"ended with {self._ended()}")
        try:
            answer = json.loads(line)
        except json.JSONDecodeError as error:
            raise LostError(f"answered {line.strip()[:100]!r}") from error
        if "error" in answer:
            raise LostError(answer["error"])
        time.sleep(PAUSE)
        return answer["answer"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and what was to be told it has not been read
            self._process.stdin.close()
        self._process.stdout.close()
        self._ended()

    def _ended(self) -> int:
        """The exit status; a process that does not end by itself is ended."""
        try:
            return self._process.wait(timeout=60)
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

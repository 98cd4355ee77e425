"""Processes that live through a measurement and are asked by turns: a request and an answer are a line of JSON each.

Nothing but the standard library is imported, so that the interpreters of all sides can use it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

PAUSE = 0.3  # seconds between two turns, in which the threads of the side that was just at work fall asleep


class LostError(RuntimeError):
    """The process has ended: it ran out of memory, or was not what it was taken for."""


class Worker:
    """The other end of a process that calls `serve`."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None):
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | (environment or {})
        )

    def ask(self, do: str, **request: Any) -> Any:
        """The answer; raises LostError that says why where there is none."""
        try:
            self._process.stdin.write(json.dumps({"do": do} | request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise LostError(f"ended with {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise LostError(answer["error"])
        time.sleep(PAUSE)
        return answer["answer"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve(functions: dict[str, Callable[..., Any]]) -> None:
    """Answers requests from the standard input by these functions until it ends. What they print goes to the standard
    error.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
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

"""A process that decodes images for `nfjax.data.loading.stream`, until the pipe to it closes.

It is started as a program of its own, python -m nfjax.data.loading.worker, and imports nothing but this package's
reading part: neither JAX, whose threads no process should be forked from, nor the user's script. Pixels go into memory
that both processes map; the pipe carries references there, labels and failures back.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection

import numpy as np

from nfjax.data.loading.skips import explained

Failure = tuple[int, str, str]  # place in the task, cause, detail
READY = None  # the first answer: what ends a worker before that is no image's fault


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains; it closes the pipe
    import cv2

    cv2.setNumThreads(0)  # one thread a process: there is a process for every core
    pipe, memory = Connection(int(sys.argv[1])), int(sys.argv[2])
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the other side is gone or done
        serve(pipe, memory)


def serve(pipe: Connection, memory: int) -> None:
    """Says `READY`, then answers tasks (first row, [(reference, position, checked)]) with (labels, failures) until the
    pipe closes.
    """
    program, shape = pipe.recv()
    reader, transform = pickle.loads(program)
    rows = np.frombuffer(mmap.mmap(memory, int(np.prod(shape))), np.uint8).reshape(shape)
    os.close(memory)
    pipe.send(READY)
    while True:
        first, examples = pipe.recv()
        labels, failures = np.zeros(len(examples), np.int32), []
        for i, (reference, position, checked) in enumerate(examples):
            try:
                data, labels[i] = reader(reference)
                rows[first + i] = transform(data, position, checked)
            except Exception as error:  # any file may be bad in any way; it is named, and the run decides
                rows[first + i] = 0
                failures.append((i, *explained(error)))
        pipe.send((labels, failures))


if __name__ == "__main__":
    main()

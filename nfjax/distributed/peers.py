"""The processes of one run meet before they train, and each notices within seconds when another one has ended.

JAX's own service waits five minutes for a process that ended while it started, a minute for one that fell silent, and
then aborts the others with a dump. Here every process keeps a connection to process 0, over which nothing is sent: the
system closes it when a process ends, however it does. All meet at the port of JAX's coordinator, before JAX takes it,
so that no other port has to be known or open.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import math
import selectors
import signal
import socket
import threading
import time

from nfjax import preemption

LOST = 3  # seconds for this process to end in its own way after another one was killed
LEFT = 10  # the same after another one has left with a message of its own, as this one probably does as well
HEARING = 1  # seconds in which the end of another one is heard of, which may be why this one fails
RETRY = 0.2  # seconds between two attempts to reach process 0
INTRODUCTION = 10  # seconds in which whoever connects has to say who it is
# Seconds until a machine that is gone without a word counts as lost: IDLE + INTERVAL * COUNT, less than JAX's own.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


class AbsentError(RuntimeError):
    """Another process of the run has not come, or has ended while the others were waited for."""


def meet(host: str, port: int, processes: int, process: int, timeout: float) -> Watch:
    """Returns when all processes of the run have come to HOST:PORT, the address of process 0.

    Raises AbsentError where one does not come within `timeout` seconds or ends before all are there, ValueError where
    they do not agree on their number or two are the same one, OSError where process 0 cannot listen at its port.
    """
    deadline = time.monotonic() + timeout
    if process == 0:
        others = _receive(port, processes, deadline)
    else:
        others = {0: _go_to(host, port, processes, process, deadline)}
    for connection in others.values():
        _keep_alive(connection)
    return Watch(process, others)


class Watch:
    """Ends this process when another one of the run has ended and this one does not.

    others: connections by the number of the process; process 0 has one to each, the others one to process 0. What is
    sent over them are lines: "done", or "left" and its code, before a process ends by itself, "lost 3" where process 0
    saw one end.
    """

    def __init__(self, process: int, others: dict[int, socket.socket]):
        self._process, self._others = process, others
        self._changed = threading.Condition()  # of what follows
        self._leaving = False  # whether this process ends by itself
        self._busy = set(others)  # those that have not said that they end, and have not ended
        self._there = set(others)  # those that have not ended
        self._lost = False  # whether one has ended that should be started again
        self._due, self._why = math.inf, ""  # when this process is ended
        # Also of a program that does not call `leave`; before JAX leaves, as it came before.
        atexit.register(self._send, "done")
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def leave(self, code: int) -> int:
        """Tells the others that this process ends by itself, and returns when it may, with which code: `code`, or
        `preemption.START_AGAIN` where it fails after another one has ended.

        Done, all of them wait for each other: JAX would take the end of the first for a failure. Otherwise process 0
        is the last one, for the same reason, and waits for the others no longer than they have.
        """
        with self._changed:
            # Whatever is under way together, a step, a save, fails in its own way where one of them has ended.
            if code == 1 and self._changed.wait_for(lambda: self._lost, HEARING):
                code = preemption.START_AGAIN
            self._leaving = True
        self._send(f"left {code}" if code else "done")
        with self._changed:
            if not code:
                self._changed.wait_for(lambda: not self._busy)
            if self._process == 0:
                self._changed.wait_for(lambda: not self._there, LEFT + 2)
        return code

    def _send(self, line: str) -> None:
        for connection in self._others.values():
            with contextlib.suppress(OSError):  # it has ended: `_watch` hears of that
                connection.sendall(f"{line}\n".encode())

    def _watch(self) -> None:
        heard = dict.fromkeys(self._others, b"")
        with selectors.DefaultSelector() as selector:
            for number, connection in self._others.items():
                selector.register(connection, selectors.EVENT_READ, number)
            while selector.get_map() or self._due < math.inf:
                left = self._due - time.monotonic()
                for key, _ in selector.select(None if left == math.inf else max(left, 0)):
                    try:
                        said = key.fileobj.recv(4096)
                    except OSError:
                        said = b""  # reset, or not heard of for too long
                    *lines, heard[key.data] = (heard[key.data] + said).split(b"\n")
                    for line in lines:
                        self._hear(key.data, line.decode(errors="replace"))
                    if not said:
                        selector.unregister(key.fileobj)
                        self._closed(key.data)
                self._end_if_due()

    def _hear(self, number: int, line: str) -> None:
        word, _, value = line.partition(" ")
        if word == "lost":
            self._end_in(0, f"process {value} has ended, or cannot be reached")
            return
        with self._changed:
            was_busy = number in self._busy
            self._busy.discard(number)
            self._lost |= word == "left" and value != "1"
            self._changed.notify_all()
        if word == "left" and was_busy:
            self._end_in(LEFT, f"process {number} has ended; its own message says why")

    def _closed(self, number: int) -> None:
        with self._changed:
            was_busy = number in self._busy
            self._busy.discard(number)
            self._there.discard(number)
            self._lost |= was_busy
            self._changed.notify_all()
        if was_busy:
            if self._process == 0:
                self._send(f"lost {number}")
            # Process 0 writes what is written once, and may notice in its own way that the others are gone. They would
            # be aborted by JAX, as its service ends with process 0.
            self._end_in(0 if self._process else LOST, f"process {number} has ended, or cannot be reached")

    def _end_in(self, seconds: float, why: str) -> None:
        """Ends this process after so many seconds, unless it ends by itself before."""
        due = time.monotonic() + seconds
        if due < self._due:
            self._due, self._why = due, why

    def _end_if_due(self) -> None:
        if time.monotonic() < self._due:
            return
        self._due = math.inf
        with self._changed:
            if self._leaving:
                return
        preemption.at_once(
            preemption.START_AGAIN,
            f"nfjax: {self._why}: process {self._process} ends as well. What was saved is whole: the same command, for "
            "all processes, goes on from there",
        )


def hold_aborts() -> None:
    """JAX aborts a process whose coordinator has ended; from here on every abort waits for some seconds, in which the
    `Watch` ends the process as it should be ended.
    """
    # abort() raises SIGABRT before it ends the process, and `sleep` may be called by a handler, as one: it gets the
    # number of the signal, 6, for its seconds. Python cannot be: the thread that aborts may hold any lock.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _receive(port: int, processes: int, deadline: float) -> dict[int, socket.socket]:
    """As process 0: a connection to each of the others."""
    others: dict[int, socket.socket] = {}
    strangers: dict[socket.socket, float] = {}  # have not said yet who they are: until when they may
    with _listen(port) as listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(others) < processes - 1:
            now = time.monotonic()
            if now > deadline:
                absent = [str(i) for i in range(1, processes) if i not in others]
                raise AbsentError(
                    f"process {', '.join(absent)} of {processes} has not come to port {port} of process 0: is it "
                    "running, with the same --coordinator?"
                )
            for stranger in [x for x, until in strangers.items() if now > until]:
                _forget(selector, strangers, stranger)
            for key, _ in selector.select(0.5):
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    strangers[connection] = now + INTRODUCTION
                    selector.register(connection, selectors.EVENT_READ)
                elif key.fileobj in strangers:
                    number = _introduced(key.fileobj, processes, others)
                    if number is None:
                        _forget(selector, strangers, key.fileobj)
                    else:
                        del strangers[key.fileobj]
                        others[number] = key.fileobj
                else:
                    (number,) = (i for i, x in others.items() if x is key.fileobj)
                    raise AbsentError(f"process {number} has ended while the others were waited for")
    for stranger in strangers:
        stranger.close()
    for connection in others.values():
        connection.sendall(b"go\n")
    return others


def _listen(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=dual)
    except OSError as error:
        raise OSError(
            error.errno, f"process 0 cannot listen at port {port} ({error.strerror}); choose another in --coordinator"
        ) from error


def _forget(selector: selectors.BaseSelector, strangers: dict[socket.socket, float], stranger: socket.socket) -> None:
    selector.unregister(stranger)
    del strangers[stranger]
    stranger.close()


def _introduced(connection: socket.socket, processes: int, others: dict[int, socket.socket]) -> int | None:
    """Which process this is; None for somebody else. Raises ValueError for one that does not belong to this run."""
    connection.settimeout(1)
    try:
        words = connection.recv(256).decode(errors="replace").split()
    except OSError:
        return None
    connection.settimeout(None)
    if len(words) != 3 or words[0] != "nfjax" or not all(word.isdecimal() for word in words[1:]):
        return None
    theirs, number = map(int, words[1:])
    problem = None
    if theirs != processes:
        problem = f"process {number} was started as one of {theirs}, process 0 as one of {processes}"
    elif number in others:
        problem = f"process {number} was started twice"
    if problem:
        for told in (connection, *others.values()):
            told.sendall(f"no {problem}\n".encode())
        raise ValueError(f"{problem}: expected --process=0 to {processes - 1}, each once, of --processes={processes}")
    return number


def _go_to(host: str, port: int, processes: int, process: int, deadline: float) -> socket.socket:
    """As another process: a connection to process 0, when all have come there."""
    connection, problem = None, ""
    while connection is None:
        if time.monotonic() > deadline:
            raise AbsentError(f"process 0 does not answer at {host}:{port} ({problem}): is it running there?")
        try:
            connection = socket.create_connection((host.strip("[]"), port), timeout=5)
        except OSError as error:  # not there yet, or its name not known yet
            problem = str(error)
            time.sleep(RETRY)
    connection.settimeout(max(1.0, deadline + INTRODUCTION - time.monotonic()))
    try:
        connection.sendall(f"nfjax {processes} {process}\n".encode())
        answer = b""
        while not answer.endswith(b"\n") and (part := connection.recv(1)):
            answer += part
    except OSError:
        answer = b""
    word, _, reason = answer.decode(errors="replace").strip().partition(" ")
    if word == "no":
        raise ValueError(f"{reason}: expected --process=0 to --processes - 1, each once")
    if word != "go":
        raise AbsentError("process 0 has ended while the others were waited for")
    connection.settimeout(None)
    return connection


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # macOS and Linux have different ones
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

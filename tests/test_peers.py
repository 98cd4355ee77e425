"""The processes of a run meet, and notice within seconds when one of them has ended; here threads stand in for most."""

import concurrent.futures
import contextlib
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
from test_distributed import free_port

from nfjax import distributed, preemption
from nfjax.distributed import peers

SOON = 20  # seconds; on a machine that does much else


class Run:
    """Process 0 and its peers as connections of this one; what `preemption.at_once` would have ended."""

    def __init__(self, monkeypatch):
        self.ended, self._sockets, self._watches = {}, [], {}
        self._changed = threading.Condition()
        monkeypatch.setattr(preemption, "at_once", self._end)

    def _end(self, code, message=""):
        number = int(re.search(r"process (\d) ends as well", message)[1])
        with self._changed:
            self.ended[number] = (code, message)
            self._changed.notify_all()

    def watched(self, processes, zero=True):
        """{number: Watch}, and {number: (the end of process 0, its own end)}."""
        pairs = {i: socket.socketpair() for i in range(1, processes)}
        self._sockets += [end for pair in pairs.values() for end in pair]
        self._watches = {0: peers.Watch(0, {i: pair[0] for i, pair in pairs.items()})} if zero else {}
        self._watches |= {i: peers.Watch(i, {0: pair[1]}) for i, pair in pairs.items()}
        return self._watches, pairs

    def wait_for(self, numbers):
        with self._changed:
            assert self._changed.wait_for(lambda: set(self.ended) >= set(numbers), SOON), self.ended

    def close(self):
        for watch in self._watches.values():
            watch._leaving = True
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in threading.enumerate():  # they end when nothing can be heard any more
            if thread.name == "peers":
                thread.join(SOON)
        for end in self._sockets:
            end.close()


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(peers, "LOST", 0.1)
    monkeypatch.setattr(peers, "LEFT", 0.1)
    with contextlib.closing(Run(monkeypatch)) as made:
        yield made


def cut(end):
    """What the system does to a connection when its process ends."""
    end.shutdown(socket.SHUT_RDWR)


def test_one_that_is_killed_ends_all(run):
    _, pairs = run.watched(3)
    cut(pairs[2][0])
    run.wait_for([0, 1])
    code, message = run.ended[1]
    assert code == 75
    assert message.startswith("nfjax: process 2 has ended, or cannot be reached: process 1 ends as well. ")
    assert run.ended[0][0] == 75


def test_process_0_that_is_killed_ends_all(run):
    _, pairs = run.watched(3, zero=False)
    for pair in pairs.values():
        cut(pair[0])
    run.wait_for([1, 2])
    assert all(message.startswith("nfjax: process 0 has ended") for _, message in run.ended.values())


def test_process_0_has_time_to_end_in_its_own_way(run, monkeypatch):
    monkeypatch.setattr(peers, "LOST", 2)
    watches, pairs = run.watched(2)
    cut(pairs[1][0])
    run.wait_for([1])
    watches[0].leave(75)  # returns: the other one is gone
    time.sleep(0.2)
    assert 0 not in run.ended


def test_what_fails_because_another_one_was_killed_is_to_be_started_again(run, monkeypatch):
    monkeypatch.setattr(peers, "LOST", 2)
    watches, pairs = run.watched(3)
    threading.Timer(0.1, cut, [pairs[1][0]]).start()  # the failure is known before its reason
    assert watches[0].leave(1) == 75
    run.wait_for([1, 2])


def test_one_that_fails_with_a_message_ends_the_others_later(run):
    watches, _ = run.watched(3)
    assert watches[2].leave(1) == 1
    run.wait_for([0])
    assert run.ended[0][0] == 75
    assert "process 2 has ended; its own message says why" in run.ended[0][1]
    assert 2 not in run.ended


def test_done_they_wait_for_each_other_and_end_nobody(run):
    watches, _ = run.watched(3)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = [pool.submit(watches[i].leave, 0) for i in (1, 2)]
        time.sleep(0.2)
        assert not any(future.done() for future in first)  # process 0 may still be drawing its curves
        last = pool.submit(watches[0].leave, 0)
        for future in first:
            assert future.result(SOON) == 0
        run.close()  # they end; process 0 is the last
        assert last.result(SOON) == 0
    assert run.ended == {}


def met(*arguments, timeout=SOON):
    """`peers.meet`, its connections closed at once."""
    watch = peers.meet("localhost", *arguments, timeout)
    for other in watch._others.values():
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)
        other.close()
    return sorted(watch._others)


@pytest.fixture
def quiet(monkeypatch):
    """Watches that watch nothing."""
    monkeypatch.setattr(peers.Watch, "_watch", lambda self: None)


def test_they_meet_whatever_else_connects(quiet):
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        coming = [pool.submit(met, port, 3, i) for i in (2, 0)]
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"nfjax 3 x\n"):
            with contextlib.closing(_connected(port)) as stranger:
                stranger.sendall(said)
        assert met(port, 3, 1) == [0]
        assert [future.result() for future in coming] == [[0], [1, 2]]
        # JAX takes the same port next.
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
            listener.listen()


def _connected(port):
    until = time.monotonic() + SOON
    while True:
        try:
            return socket.create_connection(("localhost", port), timeout=SOON)
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_one_that_does_not_come_is_named(quiet):
    with pytest.raises(peers.AbsentError, match="process 1, 2 of 3 has not come to port"):
        met(free_port(), 3, 0, timeout=0.1)
    with pytest.raises(peers.AbsentError, match=r"process 0 does not answer at localhost:\d+ \(.*refused"):
        met(free_port(), 2, 1, timeout=0.1)


def test_one_that_ends_while_the_others_are_waited_for(quiet):
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        zero = pool.submit(met, port, 3, 0)
        with contextlib.closing(_connected(port)) as one:
            one.sendall(b"nfjax 3 1\n")
        with pytest.raises(peers.AbsentError, match="process 1 has ended while the others were waited for"):
            zero.result(SOON)
        with socket.create_server(("localhost", port)) as listener:
            two = pool.submit(met, port, 3, 2)
            listener.accept()[0].close()
            with pytest.raises(peers.AbsentError, match="process 0 has ended while the others were waited for"):
                two.result(SOON)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, 1), "process 1 was started as one of 3, process 0 as one of 2"), ((2, 0), "cannot listen at port")],
)
def test_those_that_do_not_agree_are_told(quiet, arguments, message):
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        zero = pool.submit(met, port, 2, 0)
        _connected(port).close()
        with pytest.raises((ValueError, OSError), match=message):
            met(port, *arguments)
        if arguments[1] == 0:  # the first one waits on
            assert met(port, 2, 1) == [0]
            assert zero.result(SOON) == [1]
        else:
            with pytest.raises(ValueError, match=message):
                zero.result(SOON)


# A process that has joined the other one, and starts up for ever.
STARTING = """
import sys, time
from nfjax import preemption
preemption.begin()
from nfjax import distributed
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
print("joined")
sys.stdout.flush()
while True: time.sleep(1)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_during_start_up(victim):
    assert peers.LOST < 10 < distributed.HEARTBEAT
    address = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", STARTING, address, str(i)], cwd=pathlib.Path(__file__).parent.parent,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout.readline() == "joined\n"
        processes[victim].kill()
        begin = time.monotonic()
        _, errors = processes[1 - victim].communicate(timeout=60)
        assert time.monotonic() - begin < distributed.HEARTBEAT / 2
        assert processes[1 - victim].returncode == 75
        assert f"nfjax: process {victim} has ended" in errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()

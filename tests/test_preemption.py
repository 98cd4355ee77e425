"""Ctrl-C and SIGTERM before a run heeds them: one line, and the code that the launch scripts know."""

import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from nfjax.preemption import Interrupts

ROOT = pathlib.Path(__file__).parent.parent
# SQLite stands in for a compiler: it works for ever without coming back to Python.
WORK = {
    "in Python": "while True: pass",
    "within a library": "import sqlite3\nsqlite3.connect('').execute('with recursive c(x) as (select 1 union "
    "all select x + 1 from c) select count(*) from c')",
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_a_start_wherever_it_is(work, number, code):
    program = f"from nfjax import preemption\npreemption.begin()\nprint('ready', flush=True)\n{WORK[work]}"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    what = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
    assert errors == f"nfjax: {what}: start the same command again\n"


def test_a_run_that_heeds_a_signal_is_given_time():
    """The handler from before is back at once, for a second signal, and does not take the first for it."""
    program = """if True:
        import signal, time
        from nfjax import preemption
        from nfjax.runs import progress
        preemption.begin()
        with preemption.Interrupts() as interrupts:
            signal.raise_signal(signal.SIGTERM)
            assert interrupts.pending == signal.SIGTERM
            time.sleep(3 * preemption.PATIENCE)
            print("saved", flush=True)
            signal.raise_signal(signal.SIGTERM)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (75, "saved\n")
    assert done.stderr.endswith("nfjax: stopped by SIGTERM: start the same command again\n")


def test_signals_are_heeded_once_there_is_something_to_save():
    with Interrupts(late=True) as interrupts:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interrupts.pending is None
        interrupts.heed()
        signal.raise_signal(signal.SIGINT)
        assert interrupts.pending == signal.SIGINT
        interrupts.heed()  # at the next step: the second signal still ends it
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_that_are_not_pythons_stay(monkeypatch):
    set_to = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else signal.SIG_DFL)
    monkeypatch.setattr(signal, "signal", lambda number, handler: set_to.append(number) or signal.SIG_DFL)
    with Interrupts():
        pass
    assert set_to == [signal.SIGINT, signal.SIGINT]


def test_another_thread_has_no_signals():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with Interrupts() as interrupts:
            seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))
            interrupts.heed()
        seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, before]

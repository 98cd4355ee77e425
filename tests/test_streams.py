"""What is printed never ends a program, and a picture needs neither a window nor a home."""

import io
import os
import pathlib
import subprocess
import sys

import pytest

from nfjax import _streams as streams
from nfjax.runs.progress import say

ROOT = pathlib.Path(__file__).parent.parent


def encoded(encoding):
    raw = io.BytesIO()
    return raw, io.TextIOWrapper(raw, encoding=encoding, write_through=True)


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "99 % ± 1 ✓ caf\\udce9\n".encode()),
        ("latin-1", b"99 % \xb1 1 \\u2713 caf\\udce9\n"),
        ("ascii", b"99 % \\xb1 1 \\u2713 caf\\udce9\n"),
    ],
)
def test_letters_that_a_stream_lacks_become_escapes(encoding, expected):
    raw, stream = encoded(encoding)
    print("99 % ± 1 ✓ caf\udce9", file=streams.Sturdy(stream), flush=True)
    assert raw.getvalue() == expected


class Failing(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text=None):
        raise self.error

    flush = write


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (BrokenPipeError(32, "Broken pipe"), ""),
        (OSError(9, "Bad file descriptor"), ""),
        (ValueError("I/O operation on closed file."), ""),
        (
            OSError(28, "No space left"),
            "nfjax: what is printed cannot be written (No space left)\n",
        ),
    ],
)
def test_what_cannot_be_written_is_dropped(capfd, error, told):
    sturdy = streams.Sturdy(Failing(error))
    for _ in range(2):
        print("x", file=sturdy, flush=True)
    assert capfd.readouterr().err == told


def test_a_line_for_a_person_where_there_is_no_stream(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    say("nobody reads this")
    assert not streams.out().isatty()


def test_a_program_without_streams(tmp_path):
    """No file gets the number of a standard stream, and a reader that has gone is no failure."""
    program = f"""if True:
        from nfjax import preemption
        preemption.begin()
        file = open({str(tmp_path / "metrics")!r}, "w")
        assert file.fileno() > 2
        print("lost")
        import os, sys
        os.write(1, b"lost as well")
        print("lost too", file=sys.stderr)
        file.write("kept")
    """
    shell = ["bash", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, "-c", program]
    assert subprocess.run(shell, cwd=ROOT, timeout=120).returncode == 0
    assert (tmp_path / "metrics").read_text() == "kept"

    program = "from nfjax import preemption\npreemption.begin()\nfor i in range(99999): print(i)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0


@pytest.mark.parametrize(("backend", "taken"), [("module://not.installed", None), ("nonsense", None), ("svg", "svg")])
def test_a_figure_whatever_backend_the_environment_names(tmp_path, backend, taken):
    """As in a process that a notebook has started, here without a home directory besides."""
    program = f"""if True:
        import os, pwd
        def unknown(number): raise KeyError(number)
        pwd.getpwuid = unknown
        from nfjax import _figures as figures
        figures.new(figsize=(1, 1)).savefig({str(tmp_path / "a.png")!r})
        assert os.environ["MPLBACKEND"] == {backend!r}
        import matplotlib
        print(matplotlib.rcParams._get("backend"))
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "MPLCONFIGDIR")}
    environment |= {"MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert taken is None or done.stdout == f"{taken}\n"

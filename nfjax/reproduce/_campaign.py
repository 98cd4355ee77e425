"""One command for a machine that is lent for some minutes: the most telling of what is missing, in order of value.

Every job is a command that holds its minutes and goes on where it was stopped, in a process of its own: this one takes
nothing of the device.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import nfjax
from nfjax import compilation, preemption
from nfjax.reproduce._pace import shown
from nfjax.reproduce._records import Device
from nfjax.reproduce._runs import Request

ROOT = pathlib.Path(nfjax.__file__).parent.parent
LEAST = 0.5  # minutes with which a job is started: a quarter of that passes until its process has the device
SPEED = 0.25  # share of the time that the speed table may take before the trainings
EXAMPLES = {"cpu": 640}  # of an epoch that is timed; on an accelerator all there are
FIGURE_3 = ("ResNet-50 BatchNorm", "ResNet-50 ConvShort, He fan-out", "ResNet-50 ConvShort, effective fan-out")


class CampaignError(RuntimeError):
    """Some of the jobs could not be done."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A command that takes --minutes.

    Attributes:
        about: What it brings.
        command: Arguments of this interpreter, without --minutes.
        share: Of the minutes of the campaign, which it takes at most.
        obstacle: Why it cannot be done here; empty if it can.
    """

    about: str
    command: Sequence[str]
    share: float = 1.0
    obstacle: str = ""


def find_device() -> Device:
    """What the jobs will run on.

    Raises:
        CampaignError: JAX finds no device.
    """
    code = (
        "import json, jax; first, *_ = jax.devices(); "
        "print(json.dumps({'kind': first.device_kind, 'platform': first.platform, 'count': jax.device_count()}))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=_environment(), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise CampaignError(f"JAX finds no device: {sys.executable} -c 'import jax; jax.devices()' says why")
    return json.loads(done.stdout.splitlines()[-1])


def jobs(request: Request, device: Device, torch_python: str | None = None, images: str | None = None) -> list[Job]:
    """All that is to be done, in order of value.

    Args:
        request: What is trained, and where results go.
        device: What there is.
        torch_python: An interpreter that has PyTorch; without it nfjax is measured alone.
        images: Folder of large JPEG files, for the loader.
    """
    on_cpu = device["platform"] == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    width = [f"--width={request.changes['model.width']}"] if "model.width" in request.changes else []
    in_checkout = (ROOT / "benchmarks" / "turns.py").exists()
    packed = "" if in_checkout else "the benchmarks are in the repository, not in the package: use a checkout of it"

    def bench(about: str, case: str, *flags: str, sides: str = "", share: float = 1.0, obstacle: str = "") -> Job:
        """sides: those beside nfjax."""
        there = torch_python is not None and sides
        chosen = [f"--sides=nfjax,{sides}", f"--torch-python={torch_python}"] if there else ["--sides=nfjax"]
        alone = " (nfjax alone: PyTorch is another interpreter, --torch-python=PYTHON)" if sides and not there else ""
        command = ["-m", "benchmarks", case, f"--out={request.out.resolve()}", *chosen, *flags, "--missing"]
        return Job(about + alone, command, share, packed or obstacle)

    def train(about: str, name: str, *flags: str) -> Job:
        changes = [f"--config.{field}={'none' if value is None else value}" for field, value in request.changes.items()]
        where = [f"--data={request.data}", f"--data-name={request.data_name}"]
        where += [f"--out={request.out}", f"--runs={request.runs}"]
        return Job(about, ["-m", "nfjax.reproduce", name, *where, *flags, *changes])

    rivals = "eager,compile" if on_cpu else "compile,timm compile"
    depths = "18,50" if on_cpu else "50,18"
    speed = ("speed", f"--depths={depths}", f"--dtypes={dtype}", *width)
    seeds = f"--seeds={request.seeds}"
    examples = [f"--examples={EXAMPLES['cpu']}"] if on_cpu else []
    in_folders = request.changes.get("data.source", "folder") == "folder"
    own = [f"--data={os.path.abspath(request.data)}"] if in_folders else []
    return [
        bench("speed of a training step", *speed, sides=rivals, share=SPEED),
        train("figure 7: ResNet-18", "figure7", seeds),
        train("figure 3: ResNet-50", "figure3", seeds, *(f"--network={network}" for network in FIGURE_3)),
        train("depth: ResNet-18 to ResNet-152", "depth", "--seeds=1"),
        bench("RandAugment's cost", "augmentation", f"--dtype={dtype}", sides="torchvision"),
        bench("an epoch", "epoch", f"--dtype={dtype}", *own, *examples, *width, sides="dataloader,device"),
        bench(
            "the loader",
            "input_pipeline",
            f"--data={os.path.abspath(images or '')}",
            sides="pool,dataloader",
            obstacle="" if images else "it needs large JPEG files, --images=DIR",
        ),
        bench("speed of a training step, what is left of it", *speed, sides=rivals),
    ]  # fmt: skip


def run(planned: Sequence[Job], runs: pathlib.Path, minutes: float) -> None:
    """Does what it can of the jobs, one after the other, each with what is left of the minutes.

    Args:
        planned: In order of value.
        runs: Folder that keeps compiled programs.
        minutes: For all of them.

    Raises:
        CampaignError: Some of them failed; the others were done.
        preemption.TrainingInterruptedError: Ctrl-C or SIGTERM, after the job has saved what it had.
    """
    until, environment = time.monotonic() + 60 * minutes, _environment(runs)
    failed = []
    for number, job in enumerate(planned, 1):
        left = (until - time.monotonic()) / 60
        allowed = min(left, job.share * minutes)
        print(f"\n({number}/{len(planned)}) {job.about}", flush=True)
        if job.obstacle:
            print(f"left out: {job.obstacle}", flush=True)
        elif allowed < LEAST:
            of = "" if job.share == 1 else f", of which it may take {shown(60 * allowed)} now"
            print(f"left out for now: {shown(60 * left)} are left{of}, less than it takes to begin", flush=True)
        else:
            command = [*job.command, f"--minutes={allowed:.2f}"]
            print(f"at most {shown(60 * allowed)}: python {shlex.join(command)}", flush=True)
            # -P: a folder of the user's that is called as the module is not taken for it.
            if code := _finished([sys.executable, "-P", *command], environment):
                print(f"failed, with exit code {code}; the others go on", flush=True)
                failed.append(job.about)
    if failed:
        raise CampaignError(f"failed: {'; '.join(failed)}; what each of them said is above")


def _environment(runs: pathlib.Path | None = None) -> dict[str, str]:
    """That of this process; with a folder, what is compiled is kept in it, and travels with it to another machine."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept: Mapping[str, Any] = {}
    if runs is not None:
        folder = runs.resolve() / "compiled"
        kept = {
            compilation.PLACE: folder,
            "TORCHINDUCTOR_CACHE_DIR": folder / "torch",
        }
    return {name: str(value) for name, value in kept.items()} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def _finished(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """The exit code of a process, which hears once of each signal that this one hears of: it saves, and ends."""
    heard: list[int] = []
    # In a session of its own, it does not hear Ctrl-C from the terminal as well, which would be the second one.
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def pass_on(number: int, frame: object) -> None:
        preemption.heard()
        heard.append(number)
        process.send_signal(signal.SIGINT)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if heard:
        kept = "what was measured is kept, and the same command goes on"
        if heard[0] == signal.SIGTERM:
            raise preemption.TrainingPreemptedError(f"stopped by SIGTERM: {kept}")
        raise preemption.TrainingInterruptedError(f"interrupted: {kept}")
    return code

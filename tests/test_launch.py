"""launch/: what the scripts would run, runs with stand-ins for python, srun and gcloud, manifests and Dockerfile."""

import importlib.metadata
import json
import os
import pathlib
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import kubernetes_validate
import pytest
import yaml

from nfjax.cli import settings, train
from nfjax.cli._parser import Parser

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ("local_gpus.sh", "slurm.sbatch", "tpu_vm.sh", "tpu_worker.sh")
MANIFESTS = ("kubernetes.yaml", "kubernetes_tpu.yaml")
FLAGS = ("--config=configs/digits_convshort.py", "--workdir=runs/a b's")
NAMED = ("--name=me", "--zone=z")
SHARED = ("--share=host:/path", "--config=configs/a.py", "--workdir=/mnt/nfjax/a")
REMOTE = "bash nfjax/launch/tpu_worker.sh"

# Stands in for python: notes how it was started and which signals it got, and ends with the codes of a plan, in turn.
PYTHON = """
import json, os, signal, sys, time
environment, folder = os.environ, os.environ["STAND_IN"]
if sys.argv[1] == "-c":
    sys.exit(134 if "unknown" in environment["XLA_FLAGS"] else 0)
given = [a.split("=")[1] for a in sys.argv if a.startswith("--process=")]
process = (given or [environment.get("SLURM_PROCID") or environment.get("WORKER") or "0"])[0]
with open(f"{folder}/plan.json") as file:
    codes = json.load(file)[process]
number = len([name for name in os.listdir(folder) if name.startswith(f"{process}.")])
note = {"argv": sys.argv[1:], "signals": [], "gpus": environment.get("CUDA_VISIBLE_DEVICES")}
def write():
    with open(f"{folder}/new-{process}", "w") as file:
        json.dump(note, file)
    os.rename(f"{folder}/new-{process}", f"{folder}/{process}.{number}")
def received(number, frame):
    note["signals"].append(number)
for wanted in (signal.SIGINT, signal.SIGTERM):
    signal.signal(wanted, received)
write()
code = codes[number]
print(f"process {process} start {number}", flush=True)
if code == "wait":
    until = time.time() + 20
    while not note["signals"] and time.time() < until:
        time.sleep(0.02)
    time.sleep(0.4)  # a second signal would come by now
    code = {signal.SIGTERM: 75, signal.SIGINT: 130}[note["signals"][0]]
    write()
sys.exit(code)
"""

# Starts the tasks as SLURM does; ends with the highest code, and kills the tasks when it gets SIGTERM.
SRUN = """
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command = command[1:]
tasks = int(os.environ["SLURM_NTASKS"])
step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
started = [
    subprocess.Popen(command, env=os.environ | step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
    for i in range(tasks)
]
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in started])
sys.exit(max(task.wait() % 256 for task in started))
"""

# Notes what it was called with. A command for all workers runs in the folder of each, as by ssh; states come in turn.
GCLOUD = """
import json, os, shutil, subprocess, sys
folder, workers = os.environ["STAND_IN"], int(os.environ["WORKERS"])
verb, arguments = sys.argv[4], sys.argv[5:]
with open(f"{folder}/gcloud.log", "a") as file:
    print(verb, *[a.split("=", 1)[1] for a in arguments if a.startswith("--command=")], file=file)
with open(f"{folder}/plan.json") as file:
    plan = json.load(file)
def in_turn(what):
    path = f"{folder}/turn-{what}"
    turn = os.path.exists(path) and int(open(path).read())
    open(path, "w").write(str(turn + 1))
    return plan[what][turn]
if verb == "describe":
    state = in_turn("states")
    sys.exit("ERROR: NOT_FOUND: no such TPU" if state == "NONE" else print(state))
if verb == "create":
    sys.exit(in_turn("create"))
homes = [f"{folder}/worker{i}" for i in range(workers)]
if verb == "scp":
    for home in homes:
        shutil.copytree("launch", f"{home}/nfjax/launch", dirs_exist_ok=True)
command = next((a.removeprefix("--command=") for a in arguments if a.startswith("--command=")), "true")
if verb == "ssh" and not command.endswith("install"):
    for home in homes:
        os.makedirs(home, exist_ok=True)
    started = [
        subprocess.Popen(["bash", "-c", command], cwd=home, env=os.environ | {"WORKER": str(i)})
        for i, home in enumerate(homes)
    ]
    sys.exit(next((code for code in [process.wait() for process in started] if code), 0))
"""


class Machine:
    """A folder with stand-ins that comes first on the PATH, and what they noted."""

    def __init__(self, folder):
        self.folder, self.started = folder, []
        for name, code in {"python": PYTHON, "srun": SRUN, "gcloud": GCLOUD}.items():
            self.add(name, f"#!{sys.executable} -SE\n{code}")
        self.add("scontrol", '#!/bin/sh\necho "$@" >>"$STAND_IN/scontrol.log"\n')
        self.add("nvidia-smi", "#!/bin/sh\necho 'GPU 0: A (UUID: a)'\necho '  MIG 1g'\necho 'GPU 1: A (UUID: b)'\n")
        unset = re.compile("XLA_FLAGS|CUDA_VISIBLE_DEVICES|PYTHON|PORT|ID|LIBTPU_INIT_ARGS|SLURM_.*")
        self.environment = {name: value for name, value in os.environ.items() if not unset.fullmatch(name)} | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "STAND_IN": str(folder),
            "RETRY": "0",
        }

    def add(self, name, text):
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)

    def plan(self, **codes):
        (self.folder / "plan.json").write_text(json.dumps({name.removeprefix("p"): c for name, c in codes.items()}))

    def start(self, script, *arguments, **environment):
        command = ["bash", str(LAUNCH / script), *arguments]
        environment = self.environment | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.started.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
        return self.started[-1]

    def close(self):
        """Ends what a failed test left behind."""
        for process in self.started:
            if process.poll() is None:
                process.terminate()
                process.communicate()

    def run(self, script, *arguments, **environment):
        """(exit code, output, errors)"""
        process = self.start(script, *arguments, **environment)
        out, errors = process.communicate(timeout=200)
        return process.returncode, out, errors

    def starts(self, process):
        """What each start of a process noted."""
        count = len(list(self.folder.glob(f"{process}.*")))
        return [json.loads((self.folder / f"{process}.{i}").read_text()) for i in range(count)]

    def wait_for_starts(self, *processes):
        wait_until(lambda: all(self.starts(process) for process in processes))

    def log(self, name):
        path = self.folder / f"{name}.log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    machine.close()


@pytest.fixture
def pod(machine):
    """With a share that counts as mounted."""
    machine.add("mountpoint", "#!/bin/sh\nexit 0\n")
    return machine


def wait_until(true):
    until = time.monotonic() + 100
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture
def free_port():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return str(taken.getsockname()[1])


def tpu_vm(machine, command, *arguments, workers=1, start=False, **environment):
    environment = {"WORKERS": str(workers), "PYTHON": "python"} | environment
    return (machine.start if start else machine.run)("tpu_vm.sh", command, *NAMED, *arguments, **environment)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script):
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, LAUNCH / script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_header(machine, script):
    code, out, _ = machine.run(script, "--help")
    lines = (LAUNCH / script).read_text().split("\n\n")[0].splitlines()[1:]
    assert code == 0
    assert out.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in lines]
    assert f"launch/{script}" in out


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local_gpus.sh", ("--workdir=b",), "--config= is missing"),
        ("local_gpus.sh", ("--config=a", "--config.workdir=b"), "--workdir= is missing"),
        ("slurm.sbatch", ("--dry-run", "--workdir=b"), "--config= is missing"),
        ("slurm.sbatch", FLAGS, "not inside a job: sbatch launch/slurm.sbatch"),
        ("tpu_vm.sh", (), "no command: expected create, copy,"),
        ("tpu_vm.sh", ("start", *NAMED), "start: expected create, copy,"),
        ("tpu_vm.sh", ("copy", "--name=me"), "copy: --zone= is missing"),
        ("tpu_vm.sh", ("create", *NAMED, "--type=t"), "create: --version= is missing"),
        ("tpu_vm.sh", ("delete", *NAMED, "--now"), "delete takes no --now"),
        ("tpu_vm.sh", ("run", *NAMED, "--workdir=b"), "run: --config= is missing"),
        ("tpu_vm.sh", ("run", *NAMED, "--config=a"), "run: --workdir= is missing"),
        ("tpu_vm.sh", ("run", *NAMED, *SHARED[1:]), "run: --share= is missing: it is what /mnt/nfjax is"),
        ("tpu_vm.sh", ("resume", *NAMED, "--type=t", "--version=v", *FLAGS), "is lost with the TPU; expected /mnt/"),
        ("tpu_worker.sh", ("run", "--now"), "run: expected --id=ID"),
        ("tpu_worker.sh", ("start",), "start: expected install, run"),
    ],
)
def test_wrong_arguments(machine, script, arguments, message):
    code, out, errors = machine.run(script, *arguments)
    assert (code, out) == (2, "")
    assert errors.startswith(f"{script}: {message}" if not message.startswith("is lost") else f"{script}: resume:")
    assert message in errors
    assert errors.count("\n") == 1


def test_no_gpu(machine):
    machine.add("nvidia-smi", "#!/bin/sh\necho No devices found\nexit 6\n")
    code, _, errors = machine.run("local_gpus.sh", *FLAGS)
    assert (code, errors) == (2, "local_gpus.sh: nvidia-smi -L finds no GPU; CUDA_VISIBLE_DEVICES=0,1 names them\n")


def dry_run(machine, script, first, *arguments, **environment):
    code, out, errors = machine.run(script, first, "--dry-run", *arguments, **environment)
    assert (code, errors) == (0, "")
    assert machine.log("gcloud") + machine.log("scontrol") + machine.starts(0) == []
    return out.splitlines()


TRAINER = "-m nfjax.main"
QUOTED = r"--config=configs/digits_convshort.py '--workdir=runs/a b'\''s'"


def test_dry_run_local_gpus(machine):
    place = "--coordinator=localhost:1234 --processes=2"
    assert dry_run(machine, "local_gpus.sh", *FLAGS, PORT="1234") == [
        f"env CUDA_VISIBLE_DEVICES={i} python {TRAINER} {place} --process={i} {QUOTED}" for i in range(2)
    ]
    lines = dry_run(machine, "local_gpus.sh", *FLAGS, CUDA_VISIBLE_DEVICES="3", PYTHON="/x/python", XLA_FLAGS="--a")
    assert lines[0] == "/x/python -c 'import jax; jax.devices()'"
    place = r"--coordinator=localhost:2\d{4} --processes=1 --process=0"
    assert re.fullmatch(f"env CUDA_VISIBLE_DEVICES=3 /x/python {TRAINER} {place} .*", lines[1])
    assert shlex.split(lines[1])[-2:] == list(FLAGS)


def test_dry_run_slurm(machine):
    task = """'trap : TERM INT; "$@"; code=$?; ((code == 0 || code >= 75)) || code=100; exit "$code"'"""
    srun = f"srun --kill-on-bad-exit=0 --cpus-per-task={{}} bash -c {task} nfjax python {TRAINER} {QUOTED}"
    assert dry_run(machine, "slurm.sbatch", *FLAGS) == [srun.format(1), "scontrol requeue JOB"]
    lines = dry_run(machine, "slurm.sbatch", *FLAGS, SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="8", XLA_FLAGS="--a")
    assert lines == ["python -c 'import jax; jax.devices()'", srun.format(8), "scontrol requeue 7"]


def test_dry_run_tpu_vm(machine):
    def lines(command, *arguments):
        return dry_run(machine, "tpu_vm.sh", command, *NAMED, *arguments, ID="1", XLA_FLAGS="--a --b")

    tpu = "gcloud compute tpus tpu-vm"
    create = [f"{tpu} create me --zone=z --accelerator-type=v6e-16 --version=v --spot"]
    copy = [
        f"{tpu} ssh me --zone=z --worker=all '--command=mkdir -p nfjax'",
        f"{tpu} scp --recurse nfjax configs launch pyproject.toml constraints.txt README.md LICENSE me:nfjax/ --zone=z "
        "--worker=all",
    ]
    install = [f"{tpu} ssh me --zone=z --worker=all '--command={REMOTE} install'"]
    train = f"{REMOTE} run --id=1 --share=host:/path -- {' '.join(SHARED[1:])}"
    run = [rf"{tpu} ssh me --zone=z --worker=all '--command=XLA_FLAGS=--a\ --b {train}'"]
    delete = [f"{tpu} delete me --zone=z --quiet"]
    new = ("--type=v6e-16", "--version=v", "--spot")
    assert lines("create", *new) == create
    assert lines("copy") == copy
    assert lines("install") == install
    assert lines("run", *SHARED) == run
    assert lines("delete") == delete
    assert lines("copy", "--project=p")[0] == copy[0].replace("--zone=z", "--zone=z --project=p")
    assert lines("resume", *new, *SHARED) == [
        f"{tpu} describe me --zone=z '--format=value(state)'",
        *delete,
        *create,
        *copy,
        *install,
        *run,
        f"{tpu} ssh me --zone=z --worker=all '--command={REMOTE} code'",
    ]
    (line,) = lines("run", "--", *FLAGS)  # quoted once for the worker's shell, and once for this one
    assert shlex.split(shlex.split(line)[-1])[-2:] == list(FLAGS)


def test_local_gpus_starts_all_again_while_one_ends_with_75(machine):
    machine.plan(p0=[75, 0, 0], p1=[75, 75, 0])
    code, _, errors = machine.run("local_gpus.sh", *FLAGS, PORT="1234")
    assert (code, errors.count("starting again")) == (0, 2)
    for i in range(2):
        place = ["--coordinator=localhost:1234", "--processes=2", f"--process={i}"]
        note = {"argv": ["-m", "nfjax.main", *place, *FLAGS], "signals": [], "gpus": str(i)}
        assert machine.starts(i) == [note] * 3


def test_local_gpus_ends_all_when_one_fails(machine):
    machine.plan(p0=["wait"], p1=[1])
    code, _, errors = machine.run("local_gpus.sh", *FLAGS)
    assert (code, errors) == (1, "local_gpus.sh: process 1 of 2 failed with 1\n")
    assert [start["signals"] for start in machine.starts(0)] == [[signal.SIGTERM]]


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_local_gpus_passes_a_signal_on_once(machine, number, expected):
    machine.plan(p0=["wait"], p1=["wait"])
    process = machine.start("local_gpus.sh", *FLAGS)
    machine.wait_for_starts(0, 1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (expected, "")
    assert [machine.starts(i)[0]["signals"] for i in range(2)] == [[number], [number]]


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # the child becomes another program at once
@pytest.mark.parametrize(
    ("arguments", "number"), [(("local_gpus.sh",), signal.SIGINT), (("tpu_vm.sh", "run", *NAMED), signal.SIGTERM)]
)
def test_ctrl_c_in_a_terminal_reaches_the_trainer_once(pod, arguments, number):
    pod.plan(p0=["wait"])
    environment = {"CUDA_VISIBLE_DEVICES": "0", "WORKERS": "1", "PYTHON": "python"}
    if arguments[0] == "tpu_vm.sh":
        tpu_vm(pod, "copy")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execvpe("bash", ["bash", str(LAUNCH / arguments[0]), *arguments[1:], *FLAGS], pod.environment | environment)
    pod.wait_for_starts(0)
    os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == {signal.SIGINT: 130, signal.SIGTERM: 75}[number]
    os.close(terminal)
    assert [start["signals"] for start in pod.starts(0)] == [[number]]


JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "8"}


def test_slurm_ends_with_the_tasks(machine):
    machine.plan(p0=[0], p1=[0])
    code, _, _ = machine.run("slurm.sbatch", *FLAGS, **JOB)
    assert (code, machine.log("scontrol")) == (0, [])
    for i in range(2):
        assert machine.starts(i) == [{"argv": ["-m", "nfjax.main", *FLAGS], "signals": [], "gpus": None}]


@pytest.mark.parametrize(("codes", "expected"), [([75, 75], 75), ([0, 75], 75), ([75, 1], 100), ([130, 75], 130)])
def test_slurm_goes_back_to_the_queue_unless_a_task_failed(machine, codes, expected):
    machine.plan(p0=codes[:1], p1=codes[1:])
    code, _, _ = machine.run("slurm.sbatch", *FLAGS, **JOB)
    assert (code, machine.log("scontrol")) == (expected, ["requeue 7"] if expected == 75 else [])


def children(pid):
    listed = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


@pytest.mark.parametrize("cancelled", [False, True])
def test_slurm_sigterm_reaches_the_trainer_once(machine, cancelled):
    """SLURM signals all processes of the tasks; and the batch shell where the job is cancelled."""
    machine.plan(p0=["wait"], p1=["wait"])
    process = machine.start("slurm.sbatch", *FLAGS, **JOB)
    machine.wait_for_starts(0, 1)
    (srun,) = children(process.pid)
    for shell in children(srun):
        for pid in (*children(shell), shell):
            os.kill(pid, signal.SIGTERM)
    if cancelled:
        process.terminate()
    process.communicate(timeout=100)
    assert process.returncode == 75
    assert [machine.starts(i)[0]["signals"] for i in range(2)] == [[signal.SIGTERM], [signal.SIGTERM]]
    assert machine.log("scontrol") == ([] if cancelled else ["requeue 7"])


NEW = ("--type=t", "--version=v")


def test_tpu_run_shows_output_and_ends_with_the_code_of_a_worker(pod):
    pod.plan(p0=[0, 0], p1=[0, 3])
    assert tpu_vm(pod, "copy", workers=2)[0] == 0
    code, out, _ = tpu_vm(pod, "run", *FLAGS, workers=2)
    assert (code, sorted(out.splitlines())) == (0, ["process 0 start 0", "process 1 start 0"])
    assert tpu_vm(pod, "run", *FLAGS, workers=2)[0] == 3
    assert pod.starts(1)[0]["argv"] == ["-m", "nfjax.main", *FLAGS]


def test_tpu_run_is_shown_again_and_not_started_twice(pod):
    """As when the connection breaks: gcloud gives the same command once more."""
    pod.plan(p0=["wait", 0])
    tpu_vm(pod, "copy")
    first = tpu_vm(pod, "run", *FLAGS, start=True, ID="1")
    pod.wait_for_starts(0)
    others = [tpu_vm(pod, "run", *FLAGS, start=True, ID=name) for name in ("1", "2")]
    time.sleep(0.5)
    others[0].send_signal(signal.SIGTERM)
    for process in (first, *others):
        out, _ = process.communicate(timeout=100)
        assert (process.returncode, out) == (75, "process 0 start 0\n")
    assert tpu_vm(pod, "run", *FLAGS, ID="1")[0] == 75
    assert [start["signals"] for start in pod.starts(0)] == [[signal.SIGTERM]]
    assert tpu_vm(pod, "run", *FLAGS, ID="3")[:2] == (0, "process 0 start 1\n")


def test_tpu_resume_after_75_and_after_preemption(pod):
    states = ["NONE", "READY", "READY", "PREEMPTED", "DELETING", "PREEMPTED"]
    pod.plan(states=states, create=[0, 1, 0], p0=[75, 255, 0])
    code, _, errors = tpu_vm(pod, "resume", *NEW, *SHARED)
    assert (code, errors.count("starting again")) == (0, 2)
    called = [line.split(" --id=")[0].replace(f"ssh {REMOTE} ", "") for line in pod.log("gcloud")]
    set_up = ["create", "ssh mkdir -p nfjax", "scp", "install"]
    first, second = ["describe", *set_up, "run", "describe", "code"], ["describe", "run", "describe"]
    assert called == [*first, *second, "describe", "describe", "delete", "create", *set_up, "run"]


def test_tpu_resume_ends_with_a_failure_behind_the_75_of_others(pod):
    pod.plan(states=["READY", "READY"], p0=[75], p1=[1])
    tpu_vm(pod, "copy", workers=2)
    assert tpu_vm(pod, "resume", *NEW, *SHARED, workers=2)[0] == 1
    assert pod.log("gcloud")[-1] == f"ssh {REMOTE} code"


def test_tpu_resume_ends_when_it_is_told_to(pod):
    pod.plan(states=["READY"], p0=["wait"])
    tpu_vm(pod, "copy")
    process = tpu_vm(pod, "resume", *NEW, *SHARED, start=True)
    pod.wait_for_starts(0)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)
    assert process.returncode == 75
    assert [start["signals"] for start in pod.starts(0)] == [[signal.SIGTERM]]


@pytest.mark.parametrize("script", ["local_gpus.sh", "slurm.sbatch", "tpu_vm.sh"])
def test_xla_flags_are_tried_before_the_run(pod, script):
    pod.plan(p0=[0], p1=[0])
    arguments = ("run", *NAMED) if script == "tpu_vm.sh" else ()
    environment = JOB | {"WORKERS": "2", "PYTHON": "python"}
    if arguments:
        tpu_vm(pod, "copy", workers=2)
    code, _, errors = pod.run(script, *arguments, *FLAGS, XLA_FLAGS="--xla_unknown=1", **environment)
    assert code == 2
    assert "no process survives its start with XLA_FLAGS=--xla_unknown=1: remove what" in errors
    assert pod.starts(0) == []
    assert pod.run(script, *arguments, *FLAGS, XLA_FLAGS="--xla_good=1", **environment)[0] == 0


def test_an_unknown_xla_flag_does_kill_the_process(machine):
    environment = {"PYTHON": sys.executable, "XLA_FLAGS": "--xla_tpu_no_such_flag=1", "JAX_PLATFORMS": "cpu"}
    code, _, errors = machine.run("local_gpus.sh", *FLAGS, **environment)
    assert code == 2
    assert "local_gpus.sh: no process survives its start with XLA_FLAGS=--xla_tpu_no_such_flag=1" in errors


def documents(manifest):
    return list(yaml.safe_load_all((LAUNCH / manifest).read_text()))


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_manifest_is_valid(manifest):
    for version in ("1.31", kubernetes_validate.latest_version()):
        for document in documents(manifest):
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_manifest_is_consistent(manifest):
    claim, service, job = documents(manifest)
    assert [document["kind"] for document in (claim, service, job)] == ["PersistentVolumeClaim", "Service", "Job"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert service["spec"] == {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"job-name": job["metadata"]["name"]},
    }
    assert pod["subdomain"] == service["metadata"]["name"]
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 300)
    (container,) = pod["containers"]
    assert {v["name"] for v in pod["volumes"]} == {m["name"] for m in container["volumeMounts"]}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    rules = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
        for code in rule["onExitCodes"]["values"]
    }
    assert rules == {75: "Ignore", 1: "FailJob", 2: "FailJob"}
    names = {r["onExitCodes"]["containerName"] for r in spec["podFailurePolicy"]["rules"] if "onExitCodes" in r}
    assert names == {container["name"]}
    flags = dict(argument.split("=", 1) for argument in container["args"])
    if manifest == "kubernetes.yaml":
        name, subdomain = job["metadata"]["name"], pod["subdomain"]
        assert flags["--coordinator"] == f"{name}-0.{subdomain}:{container['ports'][0]['containerPort']}"
        assert flags["--processes"] == str(spec["completions"])
        assert flags["--process"] == "$(JOB_COMPLETION_INDEX)"


SHARED_RUN = "/shared/runs/imagenet_convshort"


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_arguments_of_a_manifest_are_flags_of_the_trainer(manifest):
    arguments = documents(manifest)[-1]["spec"]["template"]["spec"]["containers"][0]["args"]
    arguments = [argument.replace("$(JOB_COMPLETION_INDEX)", "1") for argument in arguments]
    parser = Parser("nfjax train", train.__doc__)
    train.add_arguments(parser)
    found = parser.read(arguments, settings=True, flags=True)
    assert (found.process, found.workdir) == (1 if manifest == "kubernetes.yaml" else None, SHARED_RUN)
    assert settings.read(found).data.dir == "/shared/imagenet"


def instructions():
    """(name, rest) of each instruction of the Dockerfile."""
    text = re.sub(r"\\\n", "", (LAUNCH / "Dockerfile").read_text())
    return [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]


def test_dockerfile():
    names = [name for name, _ in instructions()]
    assert names.index("USER") == len(names) - 2  # nothing but the entry point behind it
    assert dict(instructions())["ENTRYPOINT"] == '["python", "-m", "nfjax.main"]'
    for name, rest in instructions():
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
    check, install = [rest for name, rest in instructions() if name == "RUN"][:2]
    extras = importlib.metadata.metadata("jax").get_all("Provides-Extra")
    for accelerator in ("cpu", "cuda12", "cuda13", "tpu"):
        environment = {"ACCELERATOR": accelerator}
        assert subprocess.run(["sh", "-c", check], env=environment).returncode == 0
        printed = subprocess.run(["sh", "-c", f"printf '%s\\n' {install}"], env=environment, capture_output=True)
        assert printed.stdout.decode().splitlines()[-2:] == [".[gcs,tfds]", f"jax[{accelerator}]"]
        assert accelerator in extras
    wrong = subprocess.run(["sh", "-c", check], env={"ACCELERATOR": "rocm"}, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (2, "ACCELERATOR=rocm: expected cpu, cuda12, cuda13 or tpu\n")


SMALL = (
    "--config=configs/digits_convshort.py", "--config.model.width=4", "--config.model.stage_sizes=(1,)",
    "--config.model.block=basic", "--config.epochs=1",
)  # fmt: skip


def test_local_gpus_with_the_trainer(machine, tmp_path, free_port):
    """Two processes, stopped; the next test goes on to the end."""
    workdir = tmp_path / "run"
    arguments = (*SMALL, "--config.log.every_steps=1", f"--workdir={workdir}")
    environment = {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "PORT": free_port}
    process = machine.start("local_gpus.sh", *arguments, **environment)
    metrics = workdir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and "\n" in metrics.read_text())
    process.terminate()
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 75, errors
    assert "device  2 x cpu" in out
    assert errors.count("stopped by SIGTERM: saved at step") + errors.count("stopped together with another") == 2


def test_slurm_with_the_trainer(machine, tmp_path, free_port):
    environment = JOB | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": free_port}
    code, out, errors = machine.run("slurm.sbatch", *SMALL, f"--workdir={tmp_path / 'run'}", **environment)
    assert code == 0, errors
    assert "device  2 x cpu" in out
    assert out.count("done    1 epochs, 45 steps") == 1

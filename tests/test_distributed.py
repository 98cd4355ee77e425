"""One device, several devices and several processes train the same network."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from test_train import records

from nfjax import config as base
from nfjax import distributed
from nfjax.runs import checkpoint

SCRIPT = pathlib.Path(__file__).parent / "many_devices.py"


def free_port():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


def started(devices, *arguments):
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train_on(configs, folder, devices=1, processes=1, stop_at=None):
    """{name: workdir} of runs of these configs, one after the other, below `folder`."""
    runs = {name: folder / name for name in configs}
    folder.mkdir(exist_ok=True)
    file = folder / "runs.json"
    described = {str(runs[name]): json.loads(config.to_json()) for name, config in configs.items()}
    file.write_text(json.dumps({"runs": described, "stop_at": stop_at}))
    coordinator = f"localhost:{free_port()}"
    places = [(coordinator, processes, i) for i in range(processes)] if processes > 1 else [()]
    for process in [started(devices, file, *place) for place in places]:
        out, _ = process.communicate(timeout=400)
        assert process.returncode == 0, out
        assert f"devices {devices * processes} processes {processes}" in out
    return runs


def final(workdir):
    checkpoints = checkpoint.Checkpoints(workdir, read_only=True)
    state = checkpoints.restore_untyped(checkpoints.steps()[-1])["state"]
    checkpoints.close()
    return state


def differences(ours, theirs):
    """The largest relative difference of a loss, and of a parameter to the largest of its array."""
    losses, parameters = [], []
    for a, b in zip(records(ours), records(theirs), strict=True):
        assert a["step"] == b["step"]
        losses += [abs(a[name] - b[name]) / b[name] for name in a if name.endswith("loss")]
    a, b = final(ours)["params"], final(theirs)["params"]
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        parameters.append(float(np.abs(x - y).max() / np.abs(y).max()))
    return max(losses), max(parameters)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Short runs with and without batch norm, in memory and streamed from the disk."""
    images, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 90), ("test", 20)):  # the last batch of 20 leaves some devices without an example
        for label in range(2):
            folder = images / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count // 2):
                noise = rng.integers(0, 128, (10 + i % 7, 12 + i % 5, 3)) + 120 * label
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i:03d}.jpg")
    made = {}
    kinds = (("memory", None, False), ("norm", "batch", False), ("parts", "batch", False), ("streamed", None, True))
    for name, norm, streamed in kinds:
        config = base.base()
        config.epochs, config.batch_size, config.log.every_steps = 1, 16, 1
        # Two blocks, the second with a stride: quickly compiled.
        config.model.stage_sizes, config.model.block, config.model.width, config.model.norm = (1, 1), "basic", 4, norm
        config.data.source, config.data.dir, config.data.image_size = "folder", str(images), 8
        config.augment.crop_padding, config.augment.rand_operations = 1, int(name == "memory")
        config.train.accumulate_steps = 2 if name == "parts" else 1
        if streamed:
            config.data.keep, config.data.workers = "disk", 1
            config.augment.resized_crop_scale = (0.3, 1.0)
        made[name] = config
    return made


@pytest.fixture(scope="module")
def one(configs, tmp_path_factory):
    """The same runs on one device."""
    return train_on(configs, tmp_path_factory.mktemp("one"))


# Relative to the largest number of each array, after one epoch in float32; batch norm divides by a standard deviation.
BOUNDS = {"memory": 5e-6, "streamed": 5e-6, "norm": 2e-5, "parts": 2e-5, "divided": 5e-6}


def check_equal(many, one):
    for name, workdir in many.items():
        assert max(differences(workdir, one.get(name, one["memory"]))) < BOUNDS[name], name


@pytest.mark.parametrize("devices", [2, 4])
def test_several_devices_train_as_one(configs, one, tmp_path, devices):
    chosen = {name: configs[name] for name in ("memory", "norm", "streamed" if devices == 2 else "parts")}
    check_equal(train_on(chosen, tmp_path / "many", devices), one)


def test_eight_devices_with_the_state_on_each_of_them_and_divided(configs, one, tmp_path):
    divided = configs["memory"].copy_and_resolve_references()
    divided.train.state_shards = 4
    chosen = {name: configs[name] for name in ("memory", "norm", "streamed")}
    check_equal(train_on(chosen | {"divided": divided}, tmp_path / "many", 8), one)


# What a step of two parts on four devices adds up between them.
SENT = """
import math, re, jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from nfjax import resnet
from nfjax.training import networks, sharding, step
from nfjax.training.state import Batch, TrainState

model = resnet.PreActResNet(
    residual="convshort", stage_sizes=(1, 1), block="basic", width=4, num_classes=3, rngs=nnx.Rngs(0)
)
network, params, batch_stats = networks.as_functions(model)
devices = sharding.make()
preprocess = lambda key, images: images.astype(jnp.float32)
task = step.Task(network, optax.sgd(0.1), preprocess, parts=2, mesh=devices)
batch = Batch(np.zeros((16, 8, 8, 3), np.uint8), np.zeros(16, np.int32), np.ones(16, np.float32))
batch = sharding.place(batch, sharding.by_batch(devices))
state = sharding.place(TrainState.start(params, batch_stats, task.optimizer), sharding.replicated(devices))
program = step.train_step.lower(state, batch, jax.random.key(0), task=task).compile().as_text()
results = re.findall(r"= (.*) all-reduce(?:-start)?\\(", program)
shapes = re.findall(r"f32\\[([\\d,]*)\\]", str(results))
sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]
print(jax.device_count(), sum(sizes) - sum(leaf.size for leaf in jax.tree.leaves(params)))
others = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")
assert not any(f" {name}(" in program for name in others)
"""


def test_gradients_cross_once_per_step_however_many_parts_it_has():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", SENT], env=environment, capture_output=True, text=True)
    # Besides the gradients: the loss, what it sums up to, correct answers and examples, and how many are there.
    assert run.stdout.split() == ["4", "5"], run.stdout + run.stderr


def test_two_processes_train_as_one(configs, one, tmp_path):
    many = train_on({name: configs[name] for name in ("memory", "norm", "streamed")}, tmp_path / "many", processes=2)
    check_equal(many, one)
    for workdir in many.values():  # what is written once is written once
        assert len((workdir / "versions.json").read_text().split('"started"')) == 2
        assert len(list(workdir.glob("events.*"))) == 1


def test_stopped_on_eight_devices_or_two_processes_and_continued_on_others(configs, one, tmp_path):
    """SIGTERM in the middle of the epoch, in one of the processes only."""
    divided = configs["memory"].copy_and_resolve_references()
    divided.train.state_shards = 2
    memory, streamed = ({name: configs[name]} for name in ("memory", "streamed"))
    eight = train_on(streamed | {"divided": divided}, tmp_path / "eight", 8, stop_at=3)
    two = train_on(memory, tmp_path / "two", processes=2, stop_at=3)
    for runs in (eight, two):
        assert all(records(workdir)[-1]["step"] in (3, 4) for workdir in runs.values())
    check_equal(train_on(memory, tmp_path / "two"), one)
    check_equal(train_on(streamed | {"divided": configs["memory"]}, tmp_path / "eight", processes=2), one)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # inside of salloc, but not started by srun
        (
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0"}
            | {"SLURM_LOCALID": "0"},
            "SLURM",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_MCA_orte_hnp_uri": "x"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_MCA_orte_hnp_uri": "x"}, None),
    ],
)
def test_launchers_are_recognized(environment, expected):
    assert distributed.launcher(environment) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "--processes and --process missing: expected all three"),
        (("host", 2, 0), "--coordinator=host: expected HOST:PORT"),
        (("host:1", 2, 2), "--process=2 of --processes=2: expected 0 to 1"),
    ],
)
def test_wrong_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(*arguments)

"""Several processes in one run: one per host or per accelerator, found in the environment or given explicitly."""

from __future__ import annotations

import glob
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Mapping

import jax
import numpy as np

from nfjax import preemption
from nfjax.distributed import peers

HEARTBEAT = 60  # seconds after which a process that says nothing counts as gone
START = 300  # seconds in which all processes have to arrive

_watch: peers.Watch | None = None  # of the other processes

# Where each launcher says how many processes there are.
LAUNCHERS = {
    "SLURM": ("SLURM_NTASKS", ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri")),
}


def launcher(environment: Mapping[str, str]) -> str | None:
    """Which launcher started this process as one of several.

    Args:
        environment: Variables of this process.

    Returns:
        "SLURM", "Open MPI", "TPU" or None.
    """
    for name, (count, others) in LAUNCHERS.items():
        if all(variable in environment for variable in (count, *others)) and int(environment[count]) > 1:
            return name
    chosen = environment.get("JAX_PLATFORMS", "tpu")
    has_tpu = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    if "tpu" in chosen and has_tpu and importlib.util.find_spec("libtpu"):
        return "TPU"  # one host or many: the runtime asks the TPU's metadata
    return None


def initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes of the run, before JAX is used; does nothing where there is only this one.

    From here on this process ends with `preemption.START_AGAIN`, within seconds, when another one has ended and this
    one does not. All three arguments, or none: then SLURM, Open MPI or the TPU tell.

    Args:
        coordinator: HOST:PORT of process 0.
        processes: How many there are.
        process: Which one this is, from 0.

    Raises:
        ValueError: The numbers cannot be, or not all three are given.
        AbsentError: The others do not arrive; see `nfjax.distributed.peers`.
        OSError: The port is taken.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if launcher(os.environ) is not None:
            _join(*_detected())
        return
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} missing: expected all three of --coordinator=HOST:PORT --processes=N --process=I"
        )
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(f"--coordinator={coordinator}: expected HOST:PORT of process 0, such as host1:1234")
    if not 0 <= process < processes:
        raise ValueError(f"--process={process} of --processes={processes}: expected 0 to {processes - 1}")
    # What is said explicitly holds, also inside of a SLURM job.
    _join(coordinator, processes, process)


def _detected() -> tuple[str, int, int, list[int] | None]:
    """(address of process 0, how many processes, which one this is, its devices), as JAX itself finds them."""
    from jax._src.clusters import ClusterEnv

    return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, START)


def _join(coordinator: str, processes: int, process: int, devices: list[int] | None = None) -> None:
    global _watch
    if processes == 1:
        return
    # JAX lets its coordinator listen elsewhere than the others call; so do we.
    listening = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator) if process == 0 else coordinator
    host, _, port = listening.rpartition(":")
    _watch = peers.meet(host, int(port), processes, process, START)
    peers.hold_aborts()
    before = signal.getsignal(signal.SIGTERM)
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        devices,
        cluster_detection_method="deactivate",
        initialization_timeout=START,
        heartbeat_timeout_seconds=HEARTBEAT,
    )
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # JAX has put one of its own in its place, which ends nothing


def has_others() -> bool:
    """Whether this process has joined others. Starts no backend, which may be what failed."""
    return _watch is not None


def leave(code: int) -> None:
    """Ends this process. Where there are others, so that none of them takes it for a failure of its own: done, when all
    are; otherwise without waiting for them, as they may be waiting for this one. A failure after one of them has ended
    is no failure of this one: the code is then `preemption.START_AGAIN`.
    """
    if _watch is not None:
        ended = _watch.leave(code)
        because = "nfjax: another process of the run had ended before: start the same command again, for all of them"
        preemption.at_once(ended, because if ended != code else "")
    sys.exit(code)


def is_first() -> bool:
    """Whether this process writes what is written once: metrics, pictures, lines for a person."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def same_everywhere(what: str, value: str) -> None:
    """Compares a text among all processes.

    Args:
        what: What it is, the beginning of a sentence.
        value: The text of this process, of which the first 64 bytes count.

    Raises:
        ValueError: Not all of them have the same, in every process.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        digest = np.frombuffer(value.encode().ljust(64)[:64], np.uint8)
        all_values = multihost_utils.process_allgather(digest)
        different = [i for i, other in enumerate(all_values) if (other != all_values[0]).any()]
        if different:
            raise ValueError(f"{what} of process {', '.join(map(str, different))} is not that of process 0")

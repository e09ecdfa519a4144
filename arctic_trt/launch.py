"""How this process was started, and that it ends when the job does. Needs neither torch nor MPI, so it can come first.

An MPI job has to end as a whole. A rank whose launcher is killed is told by the kernel; a rank that fails takes the others
along (:func:`end_job`), after giving the first rank a moment to report what every rank would (:func:`wait_for_leader`).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arctic_trt.errors import RefusedError
from arctic_trt.machine import available_cores

PR_SET_PDEATHSIG = 1
PATIENCE_BEFORE_MPI_S = 10.0  # ranks start many seconds apart on a busy machine
PATIENCE_S = 1.0
RANK_KEYS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
SIZE_KEYS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
RANK_PREFIXES = ("OMPI_COMM_", "OMPI_UNIVERSE", "OMPI_MCA_orte", "OMPI_MCA_ess", "PMIX_", "PMI_", "PRTE_", "MV2_COMM_")
LOCAL_SIZE_KEYS = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")


@dataclass(frozen=True, slots=True)
class Launch:
    """What the launcher said in the environment; ``world_size`` and ``local_size`` are None where it does not say."""

    rank: int
    world_size: int | None
    local_size: int | None


def find_launch(environ: Mapping[str, str]) -> Launch | None:
    """The launcher's word from ``environ``, None for a process started by hand."""
    rank, size = _first_number(environ, RANK_KEYS), _first_number(environ, SIZE_KEYS)
    if rank is None and size is None:
        return None
    if size is None and "SLURM_STEP_ID" in environ:
        size = _first_number(environ, ("SLURM_STEP_NUM_TASKS",))
    return Launch(rank or 0, size, _first_number(environ, LOCAL_SIZE_KEYS) or _slurm_local_size(environ))


def is_leader() -> bool:
    """Whether this process speaks for its job: the first rank, or the only process."""
    launch = find_launch(os.environ)
    return launch is None or launch.rank == 0


def local_threads(local_ranks: int) -> int:
    """Threads for one of ``local_ranks`` processes; an ``OMP_NUM_THREADS`` that somebody set is kept."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdigit() and int(chosen):
        return int(chosen)
    return available_cores(local_ranks)


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` for a child that is no rank of this process's job, though it may start MPI on its own."""
    return {key: value for key, value in environ.items() if not key.startswith(RANK_PREFIXES)}


def become_mpirun(count: int, arguments: Sequence[str]) -> None:
    """Become ``mpirun -n count arctic-trt arguments``; does not return.

    Raises :class:`RefusedError` when there is no mpirun beside this Python or on the PATH.
    """
    beside = Path(sys.executable).with_name("mpirun")
    program = str(beside) if beside.exists() else "mpirun"
    words = [program, "-n", str(count), "--oversubscribe", "--allow-run-as-root", sys.executable, "-m", "arctic_trt", *arguments]
    os.environ.setdefault("HOME", "/tmp")
    try:
        os.execvp(program, words)
    except FileNotFoundError:
        raise RefusedError(
            f"Starting {count} processes needs mpirun, which is not installed.", "pip install 'arctic-trt[mpi]'"
        ) from None


def tie_to_launcher() -> None:
    """Have the kernel kill this process when its parent dies, and give Open MPI the HOME it insists on.

    Does nothing outside an MPI job. Call it before anything that takes time.
    """
    if find_launch(os.environ) is None:
        return
    os.environ.setdefault("HOME", "/tmp")
    die_with_parent(os.getppid())


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent``, its parent, dies, or do so now if that has happened already."""
    import ctypes  # here, because every command line imports this module

    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was told
        os.kill(os.getpid(), signal.SIGKILL)


def wait_for_leader() -> int | None:
    """Let the first rank report a failure that all ranks see alike: it ends the job, and this process, meanwhile.

    Returns this process's rank if it was left alone with the failure, None for the first rank and outside MPI jobs.
    """
    launch = find_launch(os.environ)
    if launch is None or launch.rank == 0:
        return None
    time.sleep((PATIENCE_S if _running_mpi() else PATIENCE_BEFORE_MPI_S) + 0.1 * launch.rank)
    return launch.rank


def end_job(code: int) -> None:
    """End every rank with ``code`` if MPI runs in this process; otherwise return, and the caller exits."""
    mpi = _running_mpi()
    if mpi is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        mpi.COMM_WORLD.Abort(code)


def _slurm_local_size(environ: Mapping[str, str]) -> int | None:
    """The most tasks that Slurm's step has on a node, of ``8(x2)`` or ``4,3``."""
    counts = [part.partition("(")[0] for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")]
    return max(map(int, counts)) if counts and all(count.isdigit() for count in counts) else None


def _running_mpi() -> Any:
    """The module ``mpi4py.MPI`` while MPI runs in this process, else None."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None


def _first_number(environ: Mapping[str, str], keys: tuple[str, ...]) -> int | None:
    return next((int(environ[key]) for key in keys if environ.get(key, "").isdigit()), None)

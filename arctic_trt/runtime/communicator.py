"""What ranks say to each other, over MPI or, in a world of one, to nobody.

Sums are the same bits on every rank of a tensor-parallel group, because they are added up in rank order, which no MPI promises
of its own reductions. Routing decisions depend on it: ranks that disagree about an expert would add up nonsense.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arctic_trt.errors import ArcticTrtError, RefusedError, UsageError
from arctic_trt.launch import Launch, find_launch, local_threads
from arctic_trt.model import mapping as model

Ints = npt.NDArray[np.int32]
Numbers = npt.NDArray[Any]
SHORT_MESSAGE_INTS = 255
SMALL_SUM = 8192  # elements; a decode step's sums, where the number of message rounds is what takes time
WAIT_S = 0.002
AWAKE_S = 0.002  # longer than rank 0 is busy by itself between two steps, and no longer than a sleep
NAP_SHARE = 0.02  # ranks on GPUs wait for as long as a step takes: what they oversleep is so much of it

logger = logging.getLogger(__name__)


class Communicator(Protocol):
    """The collectives of one rank. Tensors are contiguous and, on all ranks that take part, of one shape and dtype."""

    rank: int
    world_size: int

    def all_reduce(self, x: Tensor) -> None:
        """Sum over the tensor-parallel group, in place, bit-identical on all of its ranks; float32 or float64."""

    def all_gather(self, x_TV: Tensor) -> Tensor:
        """Columns of all ranks of the tensor-parallel group side by side: float32 [T, V / tp] to [T, V]."""

    def send(self, x: Tensor, rank: int) -> None:
        """Hand float32 ``x`` to the rank that receives it; pipeline neighbours, and the last stage to rank 0."""

    def receive(self, shape: tuple[int, ...], rank: int) -> Tensor:
        """The float32 tensor that ``rank`` sends."""

    def broadcast(self, values: Ints | None) -> Ints:
        """Rank 0's ``values``, a 1-d array of int32, on every rank of the world."""

    def gather_all(self, value: Any) -> list[Any]:
        """Every rank's picklable ``value``, in rank order, on every rank."""


class SoloCommunicator:
    """A world of one rank."""

    rank = 0
    world_size = 1

    def all_reduce(self, x: Tensor) -> None:
        return

    def all_gather(self, x_TV: Tensor) -> Tensor:
        return x_TV

    def send(self, x: Tensor, rank: int) -> None:
        raise RuntimeError("a world of one rank has nobody to send to")

    def receive(self, shape: tuple[int, ...], rank: int) -> Tensor:
        raise RuntimeError("a world of one rank has nobody to receive from")

    def broadcast(self, values: Ints | None) -> Ints:
        if values is None:
            raise RuntimeError("rank 0 must say what it broadcasts")
        return values

    def gather_all(self, value: Any) -> list[Any]:
        return [value]


class MpiCommunicator:
    """A rank of ``mapping``'s world over mpi4py; ``world`` is an intracommunicator of that size."""

    def __init__(self, mapping: model.Mapping, world: Any) -> None:
        self.rank = int(world.Get_rank())
        self.world_size = int(world.Get_size())
        self._world = world
        place = mapping.rank(self.rank)
        self._group = world.Split(place.pp_rank, place.tp_rank)
        self._size = mapping.tp_size
        self._short = np.empty(SHORT_MESSAGE_INTS + 1, np.int32)

    def all_reduce(self, x: Tensor) -> None:
        if self._size == 1:
            return
        flat = x.view(-1).numpy()
        if flat.size <= SMALL_SUM:
            flat[:] = self._sum_everywhere(flat)
        else:
            flat[:] = self._sum_by_shares(flat)[: flat.size]

    def _sum_everywhere(self, flat: Numbers) -> Numbers:
        """One message round: every rank adds up everything."""
        parts = np.empty((self._size, flat.size), flat.dtype)
        self._group.Allgather(flat, parts)
        return _in_rank_order(parts)

    def _sum_by_shares(self, flat: Numbers) -> Numbers:
        """Two rounds with less to carry: each rank adds up a share, then the shares are handed round."""
        share = -(-flat.size // self._size)
        mine = np.zeros((self._size, share), flat.dtype)
        mine.reshape(-1)[: flat.size] = flat
        parts = np.empty_like(mine)
        self._group.Alltoall(mine, parts)
        self._group.Allgather(_in_rank_order(parts), mine)
        return mine.reshape(-1)

    def all_gather(self, x_TV: Tensor) -> Tensor:
        if self._size == 1:
            return x_TV
        parts = torch.empty(self._size, *x_TV.shape)
        self._group.Allgather(x_TV.contiguous().numpy(), parts.numpy())
        return parts.transpose(0, 1).reshape(len(x_TV), -1)

    def send(self, x: Tensor, rank: int) -> None:
        self._world.Send(x.contiguous().numpy(), dest=rank)

    def receive(self, shape: tuple[int, ...], rank: int) -> Tensor:
        x = torch.empty(shape)
        _wait(self._world.Irecv(x.numpy(), source=rank), AWAKE_S)
        return x

    def broadcast(self, values: Ints | None) -> Ints:
        """One message of fixed size with the count in front, and a second one only for what does not fit.

        Waits asleep for the first once it has been awake for a moment: rank 0 may have nothing to say for hours.
        """
        short = self._short
        if values is not None:
            short[0] = values.size
            short[1 : 1 + min(values.size, SHORT_MESSAGE_INTS)] = values[:SHORT_MESSAGE_INTS]
        _wait(self._world.Ibcast(short, root=0), AWAKE_S)
        count = int(short[0])
        whole: Ints = np.empty(count, np.int32) if values is None else values
        if count <= SHORT_MESSAGE_INTS:
            whole[:] = short[1 : 1 + count]
            return whole
        self._world.Bcast(whole, root=0)
        return whole

    def gather_all(self, value: Any) -> list[Any]:
        """Waits asleep: ranks that spun here would take the cores from those that are still loading."""
        _wait(self._world.Ibarrier(), 0.0)
        return list(self._world.allgather(value))


def connect(mapping: model.Mapping, environ: Mapping[str, str] = os.environ) -> Communicator:
    """Join the other ranks of an engine cut as ``mapping``, or nobody in a world of one.

    Raises :class:`RefusedError` unless exactly ``mapping.world_size`` processes were started, or when MPI is not installed.
    """
    launch = find_launch(environ)
    check_world(mapping, launch)
    if launch is None or mapping.world_size == 1:
        return SoloCommunicator()
    world = _mpi_world()
    if world.Get_size() != mapping.world_size:
        raise RefusedError(
            f"The launcher started {launch.world_size or 'some'} ranks, but MPI counts {world.Get_size()}, expected "
            f"{mapping.world_size}.",
            "mpirun and mpi4py belong to different MPIs: use the mpirun beside this Python, or reinstall mpi4py.",
        )
    local_ranks = launch.local_size or _count_local_ranks(world)
    torch.set_num_threads(local_threads(local_ranks))
    return MpiCommunicator(mapping, world)


def check_world(mapping: model.Mapping, launch: Launch | None) -> None:
    """Raise :class:`RefusedError` if the number of processes is known and is not the engine's."""
    found = 1 if launch is None else launch.world_size
    if found is None or found == mapping.world_size:
        return
    needed = mapping.world_size
    hint = f"Start it as: mpirun -n {needed} --allow-run-as-root arctic-trt ..." if needed > 1 else "Start it without mpirun."
    raise RefusedError(
        f"This engine needs {needed} rank{'s' if needed > 1 else ''} (tp {mapping.tp_size} x pp {mapping.pp_size}), got {found}.",
        hint,
    )


@contextlib.contextmanager
def agreement(comm: Communicator) -> Iterator[None]:
    """Have all ranks leave the block together: if it failed on some, it fails on all, with the lowest one's words.

    Only :class:`ArcticTrtError` is waited for and shared. Any other exception is this rank's own and has to end the job.
    """
    failure: ArcticTrtError | None = None
    try:
        yield
    except ArcticTrtError as error:
        failure = error
    if comm.world_size == 1:
        if failure:
            raise failure
        return
    found = comm.gather_all((failure.message, failure.hint, failure.exit_code) if failure else None)
    for rank, report in enumerate(found):
        if report:
            message, hint, exit_code = report
            # a wrong flag is the same for everybody; everything else happened to a rank
            shared = ArcticTrtError(message if exit_code == UsageError.exit_code else f"rank {rank}: {message}", hint)
            shared.exit_code = exit_code
            raise shared from failure


def _wait(request: Any, awake_s: float) -> None:
    """Wait for an MPI request: for ``awake_s`` awake, letting others that want this core run, and from then on asleep.

    Naps grow with the time that has been waited, up to :data:`WAIT_S`.
    """
    began = time.perf_counter()
    while not request.Test():
        waited = time.perf_counter() - began
        if waited < awake_s:
            os.sched_yield()
        else:
            time.sleep(min(WAIT_S, NAP_SHARE * waited))


def _in_rank_order(parts: Numbers) -> Numbers:
    total: Numbers = parts[0]
    for part in parts[1:]:
        total += part
    return total


def _mpi_world() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RefusedError(
            f"An engine of several ranks needs mpi4py and an MPI library, which cannot be loaded ({reason}).",
            "pip install 'arctic-trt[mpi]'",
        ) from None
    return MPI.COMM_WORLD.Dup()  # our messages stay apart from those of a library that uses the world itself, as TensorRT-LLM


def _count_local_ranks(world: Any) -> int:
    mpi = sys.modules["mpi4py.MPI"]
    node = world.Split_type(mpi.COMM_TYPE_SHARED)
    return int(node.Get_size())

"""On what a rank computes: the CPU, or one GPU of its own."""

from __future__ import annotations

import logging
import socket

import torch

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.runtime.communicator import Communicator

logger = logging.getLogger(__name__)

AUTO, CPU, CUDA = CHOICES = ("auto", "cpu", "cuda")
CAPABILITY = (8, 9)
"""The first that multiplies e4m3: Ada; Hopper is (9, 0)."""


def plan_device(asked: str, gpus: int, capability: tuple[int, int] | None, local_rank: int, local_ranks: int) -> torch.device:
    """The device of rank ``local_rank`` of the ``local_ranks`` on a host with ``gpus``, the least of them of ``capability``.

    ``auto`` takes GPUs where there is one for each rank that can multiply FP8. Raises :class:`RefusedError` for ``cuda`` where
    there is not.
    """
    if asked not in CHOICES:
        raise UsageError(f"--device {asked} is none of {', '.join(CHOICES)}.")
    if asked == CPU:
        return torch.device(CPU)
    missing = _what_is_missing(gpus, capability, local_ranks)
    if missing is None:
        return torch.device(CUDA, local_rank)
    if asked == CUDA:
        raise RefusedError(f"--device cuda: {missing}.", "Leave --device out to run on the CPU.")
    return torch.device(CPU)


def _what_is_missing(gpus: int, capability: tuple[int, int] | None, local_ranks: int) -> str | None:
    if not gpus or capability is None:
        return "this machine has no CUDA device that torch can use"
    if gpus < local_ranks:
        return f"{local_ranks} ranks on this host need a GPU each, it has {gpus}"
    if capability < CAPABILITY:
        found, needed = (".".join(map(str, each)) for each in (capability, CAPABILITY))
        return f"the GPUs have compute capability {found}, FP8 needs {needed}"
    return None


def find_place(comm: Communicator) -> tuple[int, int]:
    """Which of its host's ranks this one is, and how many there are; all ranks ask together."""
    here = socket.gethostname()
    hosts = comm.gather_all(here)
    return hosts[: comm.rank].count(here), hosts.count(here)


def find_device(asked: str, local_rank: int, local_ranks: int) -> torch.device:
    """:func:`plan_device` for this machine; makes a GPU the current one."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    capability = min((torch.cuda.get_device_capability(index) for index in range(gpus)), default=None)
    device = plan_device(asked, gpus, capability, local_rank, local_ranks)
    if asked == AUTO and gpus and device.type == CPU and not local_rank:
        logger.warning("Running on the CPU: %s.", _what_is_missing(gpus, capability, local_ranks))
    if device.type == CUDA:
        torch.cuda.set_device(device)
    return device

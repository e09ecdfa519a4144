"""On what a rank computes: the CPU, or one GPU of its own."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from arctic_trt.errors import RefusedError, UsageError

logger = logging.getLogger(__name__)

AUTO, CPU, CUDA = CHOICES = ("auto", "cpu", "cuda")
HARNESS_DEFAULT = "cuda:0"
"""What lm-evaluation-harness says for --device when nobody has said anything."""
CAPABILITY = (8, 9)
"""The first that multiplies e4m3: Ada; Hopper is (9, 0)."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What a rank sees: its host, the UUIDs of GPUs in CUDA's order, and the least compute capability among them."""

    host: str
    gpus: tuple[str, ...] = ()
    capability: tuple[int, int] | None = None


def plan_devices(asked: str, sights: Sequence[Sight]) -> list[torch.device]:
    """The device of each rank, where rank r sees ``sights[r]``. All get GPUs, or none does.

    ``auto`` takes GPUs where there is one for each rank that can multiply FP8. Raises :class:`RefusedError` for ``cuda`` where
    there is not.
    """
    if asked not in CHOICES:
        raise UsageError(f"--device {asked} is none of {', '.join(CHOICES)}.")
    missing = what_is_missing(sights)
    if asked == CUDA and missing:
        raise RefusedError(f"--device cuda: {missing}.", "Leave --device out to run on the CPU.")
    if asked == CPU or missing:
        return [torch.device(CPU)] * len(sights)
    taken = share_out([sight.gpus for sight in sights])
    return [torch.device(CUDA, sight.gpus.index(gpu)) for sight, gpu in zip(sights, taken, strict=True) if gpu]


def share_out(seen: Sequence[Sequence[str]]) -> list[str | None]:
    """A GPU for each rank out of those that it has ``seen``, none twice; None where others have taken all of them.

    Whoever sees fewest chooses first, so that it matters not whether a launcher shows each rank its own GPU or all of them.
    """
    taken: dict[int, str | None] = {}
    for rank in sorted(range(len(seen)), key=lambda rank: (len(seen[rank]), rank)):
        taken[rank] = next((gpu for gpu in seen[rank] if gpu not in taken.values()), None)
    return [taken[rank] for rank in range(len(seen))]


def what_is_missing(sights: Sequence[Sight]) -> str | None:
    """Why not every rank can have a GPU of its own, None if it can."""
    for sight in sights:
        if not sight.gpus or sight.capability is None:
            return f"{sight.host} has no CUDA device that torch can use"
        if sight.capability < CAPABILITY:
            found, needed = (".".join(map(str, each)) for each in (sight.capability, CAPABILITY))
            return f"the GPUs of {sight.host} have compute capability {found}, FP8 needs {needed}"
    for sight, gpu in zip(sights, share_out([sight.gpus for sight in sights]), strict=True):
        if gpu is None:
            neighbours = [each for each in sights if each.host == sight.host]
            gpus = len({gpu for each in neighbours for gpu in each.gpus})
            return f"{len(neighbours)} ranks on {sight.host} need a GPU each, they see {gpus}"
    return None


def plan_harness_device(asked: str | None) -> str:
    """The choice that lm-evaluation-harness's ``--device`` means; its own default leaves it open.

    Raises :class:`UsageError` for a device that an engine does not run on by that name.
    """
    if asked in (None, HARNESS_DEFAULT):
        return AUTO
    if asked not in CHOICES:
        raise UsageError(
            f"--device {asked} is none of {', '.join(CHOICES)}.", "Choose GPUs with CUDA_VISIBLE_DEVICES: each rank takes one."
        )
    return str(asked)


def look_around(asked: str) -> Sight:
    """What this rank sees; the CPU alone, if no other was asked for."""
    host = socket.gethostname()
    if asked == CPU or not torch.cuda.is_available():
        return Sight(host)
    gpus = range(torch.cuda.device_count())
    capability = min((torch.cuda.get_device_capability(index) for index in gpus), default=None)
    return Sight(host, tuple(str(torch.cuda.get_device_properties(index).uuid) for index in gpus), capability)


def take_device(asked: str, sights: Sequence[Sight], rank: int) -> torch.device:
    """``rank``'s of :func:`plan_devices`; makes a GPU the current one. On rank 0, says why there is none to take."""
    device = plan_devices(asked, sights)[rank]
    if asked == AUTO and device.type == CPU and not rank and any(sight.gpus for sight in sights):
        logger.warning("Running on the CPU: %s.", what_is_missing(sights))
    if device.type == CUDA:
        torch.cuda.set_device(device)
    return device

"""The device that calibrates and casts: the CPU, or a GPU for each process as far as there are some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from arctic_trt.errors import RefusedError

CPU, CUDA = "cpu", "cuda"


def check_device(asked: str) -> None:
    """Refuse ``cuda`` where there is none."""
    if asked == CUDA and not torch.cuda.is_available():
        raise RefusedError("--device cuda: this machine has no CUDA device that torch can use.", "Leave --device out.")


def take_device(asked: str, process: int) -> str:
    """The device of the ``process``-th of the processes that work together, by the name that torch has for it.

    From then on products of bf16 on GPUs are added up in float32, even where one is divided: calibration would otherwise see
    more roundings than the original model has.
    """
    if asked == CPU:
        return asked
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return f"{CUDA}:{process % torch.cuda.device_count()}"


@contextmanager
def full_device_refused(asked: str) -> Iterator[None]:
    """Say in a sentence that a GPU is too small for what goes on within."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise RefusedError(
            f"--device {asked}: the GPU's memory does not suffice ({str(error).split('. ')[0]}).",
            "Lower --batch_size, free the GPU, or leave --device out.",
        ) from None

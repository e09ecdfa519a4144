"""Every byte of every matrix: no NaN, no infinity, nothing that is zero throughout. One expert's matrix at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from arctic_trt.checkpoint.contract import rank_file
from arctic_trt.model.mapping import Rank
from arctic_trt.report.verify.checkpoint import OpenCheckpoint
from arctic_trt.report.verify.findings import Verification

MAGNITUDE_BITS = 0x7F
E4M3_NAN = 0x7F
Work = Callable[[], None]


def value_works(checkpoint: OpenCheckpoint, found: Verification, share: float) -> Iterator[Work]:
    """One work a matrix, in file order; ``share`` of them, chosen by their names."""
    for rank in checkpoint.mapping.ranks():
        if rank.index in checkpoint.files:
            for name in checkpoint.files[rank.index].tensors:
                if name.endswith(".weight") and chosen(f"{rank.index} {name}", share):
                    yield partial(check_matrix, checkpoint, rank, name, found)


def chosen(name: str, share: float) -> bool:
    """Whether a sample of ``share`` contains ``name``; the same names every time."""
    return share >= 1 or random.Random(name).random() < share


def check_matrix(checkpoint: OpenCheckpoint, rank: Rank, name: str, found: Verification) -> None:
    """Look at one tensor, matrix by matrix where it is a stack of experts."""
    file = checkpoint.files[rank.index]
    shape = file.tensors[name].spec.shape
    step = 1 if len(shape) == 3 else shape[0]
    padded = name in ("lm_head.weight", "transformer.vocab_embedding.weight")
    for begin in range(0, shape[0], step):
        values = file.read_rows(name, begin, begin + step)
        where = f"{name}[{begin}]" if len(shape) == 3 else name
        problem = problem_of(values)
        if problem and not (padded and problem == ZERO):  # a rank may hold padding alone
            found.error("not finite" if problem == NAN else "zero", rank_file(rank.index), name, f"{where} {problem}.")
    found.count(1, file.tensors[name].spec.num_bytes)


NAN, ZERO = "holds NaN or infinity", "is zero throughout"


def problem_of(values: Tensor) -> str | None:
    """What is wrong with a tensor of e4m3, bfloat16 or float32, by itself."""
    if values.dtype == torch.float8_e4m3fn:
        largest = int((values.view(torch.uint8) & MAGNITUDE_BITS).max())
        return NAN if largest == E4M3_NAN else ZERO if largest == 0 else None
    low, high = torch.aminmax(values)
    if not (low.isfinite() and high.isfinite()):
        return NAN
    return ZERO if low == 0 and high == 0 else None

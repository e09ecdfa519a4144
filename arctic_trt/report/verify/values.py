"""Every byte of every matrix: what was written, no NaN, no infinity, no zeros throughout. One expert's matrix at a time."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from functools import partial

from arctic_trt.checkpoint.contract import rank_file
from arctic_trt.checkpoint.tensors import bytes_of
from arctic_trt.engine.torch.format import ENGINE_EMBEDDING, ENGINE_LM_HEAD
from arctic_trt.model.mapping import Rank
from arctic_trt.model.names import EMBEDDING, LM_HEAD
from arctic_trt.report.verify.checkpoint import OpenCheckpoint, is_matrix
from arctic_trt.report.verify.findings import Verification
from arctic_trt.report.verify.numbers import check_numbers
from arctic_trt.report.verify.records import check_crc

PADDED = (EMBEDDING.trt, LM_HEAD.trt, ENGINE_EMBEDDING, ENGINE_LM_HEAD)
"""Of these a rank may hold padding alone."""
Work = Callable[[], None]


def value_works(checkpoint: OpenCheckpoint, found: Verification, share: float) -> Iterator[Work]:
    """One work a matrix, in file order; ``share`` of them, chosen by their names."""
    for rank in checkpoint.mapping.ranks():
        if rank.index in checkpoint.files:
            for name in checkpoint.files[rank.index].tensors:
                if is_matrix(name) and chosen(f"{rank.index} {name}", share):
                    yield partial(check_matrix, checkpoint, rank, name, found)


def chosen(name: str, share: float) -> bool:
    """Whether a sample of ``share`` contains ``name``; the same names every time."""
    return share >= 1 or random.Random(name).random() < share


def check_matrix(checkpoint: OpenCheckpoint, rank: Rank, name: str, found: Verification) -> None:
    """Look at one tensor, matrix by matrix where it is a stack of experts."""
    file, crc = checkpoint.files[rank.index], 0
    shape = file.tensors[name].spec.shape
    step = 1 if len(shape) == 3 else shape[0]
    for begin in range(0, shape[0], step):
        values = file.read_rows(name, begin, begin + step)
        crc = zlib.crc32(bytes_of(values), crc)
        where = f"{name}[{begin}]" if len(shape) == 3 else name
        check_numbers(values, rank_file(rank.index), name, found, where=where, may_be_zero=name in PADDED)
    check_crc(checkpoint.records.digests, rank_file(rank.index), name, crc, found)
    found.count(1, file.tensors[name].spec.num_bytes)

"""The processes that quantize one checkpoint together.

Samples are divided for the dense path and experts for the MoE; everything that crosses between processes does so here, in ways
whose result does not depend on how many there are: maxima, sums in which at most one term is not zero, and, for the MoE's
output, sums of at most two rounded terms (Arctic routes a token to two experts), which no order of addition changes.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from arctic_trt.quantize.rows import Rows

Value = TypeVar("Value")
CHUNK_ROWS = 2048


class Team(Protocol):
    """What quantization asks of the processes it runs in."""

    rank: int
    size: int

    def share(self, count: int, member: int | None = None) -> range:
        """The contiguous part of ``count`` things that ``member`` (by default this process) does."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over the processes."""
        ...

    def maximum(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Maximum by key over the processes; a key may be absent on some."""
        ...

    def exchange(self, rows: Rows, ranges: list[tuple[int, int]]) -> None:
        """Give every process the rows that each has computed."""
        ...

    def add_up(self, rows: Rows, tokens: int) -> None:
        """Replace ``rows`` by their sum over the processes, rounded once."""
        ...

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, in rank order, on all of them."""
        ...

    def broadcast(self, value: Value) -> Value:
        """The value of process 0."""
        ...

    def barrier(self) -> None:
        """Wait until every process has come here."""
        ...


def share_of(count: int, member: int, size: int) -> range:
    """``count`` things in ``size`` contiguous parts that differ by at most one."""
    return range(count * member // size, count * (member + 1) // size)


class Solo:
    """A team of one."""

    rank = 0
    size = 1

    def share(self, count: int, member: int | None = None) -> range:
        return range(count)

    def sum(self, x: Tensor) -> Tensor:
        return x

    def maximum(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return values

    def exchange(self, rows: Rows, ranges: list[tuple[int, int]]) -> None:
        pass

    def add_up(self, rows: Rows, tokens: int) -> None:
        pass

    def gather(self, value: Value) -> list[Value]:
        return [value]

    def broadcast(self, value: Value) -> Value:
        return value

    def barrier(self) -> None:
        pass


class MpiTeam:
    """The processes of an MPI communicator."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank = int(comm.rank)
        self.size = int(comm.size)

    def share(self, count: int, member: int | None = None) -> range:
        return share_of(count, self.rank if member is None else member, self.size)

    def sum(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self._comm.Allreduce(x.contiguous().numpy(), out.numpy())
        return out

    def maximum(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        merged: dict[str, Tensor] = {}
        for part in self.gather(values):
            for key, value in part.items():
                merged[key] = torch.maximum(merged[key], value) if key in merged else value
        return merged

    def exchange(self, rows: Rows, ranges: list[tuple[int, int]]) -> None:
        for root, (begin, end) in enumerate(ranges):
            for first in range(begin, end, CHUNK_ROWS):
                last = min(first + CHUNK_ROWS, end)
                x_TD = rows.read(first, last).contiguous()
                self._comm.Bcast(x_TD.view(torch.uint16).numpy(), root=root)
                if root != self.rank:
                    rows.write(first, x_TD)

    def add_up(self, rows: Rows, tokens: int) -> None:
        for first in range(0, tokens, CHUNK_ROWS):
            x_TD = rows.read(first, min(first + CHUNK_ROWS, tokens))
            rows.write(first, self.sum(x_TD.float()).to(x_TD.dtype))

    def gather(self, value: Value) -> list[Value]:
        return list(self._comm.allgather(value))

    def broadcast(self, value: Value) -> Value:
        return self._comm.bcast(value, root=0)  # type: ignore[no-any-return]

    def barrier(self) -> None:
        self._comm.Barrier()

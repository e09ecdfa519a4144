"""Every operation of real steps twice, by a kernel and by its twin, with the very same arguments: how far apart results are.

Limits are what formats and sums allow. A float32 result may differ by the order of its sum and by the tensor cores'
accumulators, which keep some 14 bits of a partial sum of e4m3 products: 2**-7 of the result or of the tensor's root mean square,
whichever is larger, at its worst, and 2**-11 on average. A bf16 result may be the neighbouring number. An e4m3 code may be the
neighbouring one, and that rarely, because a result has to lie next to a boundary; after attention, whose weights are bf16 in the
kernel, more often.

Where experts' rows lie in another order than the twin's, as a library wants them, only what is added up in the end is compared.
Their products are bf16 before the rounding to e4m3, and a few percent of the codes then differ: 2**-1 at worst, 2**-6 on average.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arctic_trt.runtime.cuda.ops import Routed

WORST, MEAN, MEAN_BF16 = 2.0**-7, 2.0**-11, 2.0**-9
WORST_SORTED, MEAN_SORTED = 2.0**-1, 2.0**-6
CODES_APART, ATTENTION_CODES_APART = 0.01, 0.06
SLOTS_APART = 0.001
SMALLEST_CODE = 2.0**-9
OF_EXPERTS = ("expert_gated", "expert_project")
SORTED = ", rows by expert"


@dataclass(slots=True)
class Worst:
    """The largest of each figure over all calls of one operation that gave results of one dtype."""

    calls: int = 0
    worst: float = 0.0
    mean: float = 0.0
    share: float = 0.0

    def take(self, worst: float, mean: float, share: float) -> None:
        self.calls += 1
        self.worst, self.mean, self.share = _larger(self.worst, worst), _larger(self.mean, mean), _larger(self.share, share)


class BothWays:
    """The operations of ``ops``, each called after its ``twin`` with copies of the same arguments; ``found`` is the account."""

    def __init__(self, ops: object, twin: object) -> None:
        self._ops, self._twin = ops, twin
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}
        self.found: dict[tuple[str, torch.dtype], Worst] = {}

    def __getattr__(self, name: str) -> Any:
        method, twin = getattr(self._ops, name), getattr(self._twin, name)

        def both(*arguments: Any, **options: Any) -> Any:
            by_expert = any(isinstance(each, Routed) and type(each) is not Routed for each in arguments)
            before, copies = ([self._copy(each) for each in arguments] for _ in range(2))
            wanted = twin(*copies, **options)
            results = method(*arguments, **options)
            if by_expert and name in OF_EXPERTS:
                self._twins[id(results)] = (results, wanted)
                return results
            triples = zip(arguments, copies, before, strict=True)
            triples = [each for each in triples if isinstance(each[0], Tensor) and id(each[0]) not in self._twins]
            if by_expert:
                self._twins.clear()
            for one, other in [*_pairs(results, wanted), *(_written(*each) for each in triples)]:
                if one.numel() or other.numel():
                    self.found.setdefault((name + SORTED * by_expert, one.dtype), Worst()).take(*_apart(one, other))
            return results

        return both

    def _copy(self, argument: Any) -> Any:
        """What the twin gets: its own result where rows lie in another order."""
        if not isinstance(argument, Tensor):
            return argument
        return self._twins.get(id(argument), (argument, argument))[1].clone()

    def rows(self) -> Iterator[tuple[str, bool, str]]:
        """For each operation and dtype a name, whether it is within the limits, and the figures in words."""
        for (name, dtype), worst in self.found.items():
            kind = str(dtype).removeprefix("torch.")
            unit = "codes" if dtype == torch.float8_e4m3fn else "of its size"
            figures = f"{worst.calls} results, worst {worst.worst:.1e} {unit}, mean {worst.mean:.1e}, {worst.share:.2%} differ"
            yield f"{name}, {kind}", _within(name, dtype, worst), figures


def _within(name: str, dtype: torch.dtype, worst: Worst) -> bool:
    if dtype == torch.float8_e4m3fn:
        return worst.worst <= 1 and worst.share <= (ATTENTION_CODES_APART if name == "attend" else CODES_APART)
    if name.endswith(SORTED):
        return worst.worst <= WORST_SORTED and worst.mean <= MEAN_SORTED
    if dtype.is_floating_point:
        return worst.worst <= WORST and worst.mean <= (MEAN_BF16 if dtype == torch.bfloat16 else MEAN)
    return worst.share <= SLOTS_APART


def _pairs(found: Any, wanted: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors that should be alike; what only one of them has is how it is done, not what."""
    if isinstance(found, Tensor) and isinstance(wanted, Tensor):
        yield found, wanted
    elif isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        for one, other in zip(found, wanted, strict=True):
            yield from _pairs(one, other)
    elif dataclasses.is_dataclass(found) and type(found) is type(wanted):
        for field in dataclasses.fields(found):
            yield from _pairs(getattr(found, field.name), getattr(wanted, field.name))


def _written(found: Tensor, wanted: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The elements of an argument that either way has changed, as it does the cache's."""
    as_bits = (each.view(torch.uint8) if each.dtype == torch.float8_e4m3fn else each for each in (found, wanted, before))
    one, other, old = as_bits
    changed = (one != old) | (other != old)
    return one[changed].view(found.dtype), other[changed].view(found.dtype)


def _apart(found: Tensor, wanted: Tensor) -> tuple[float, float, float]:
    """(worst and mean difference, share of elements that differ); codes count in codes, floats as the module says."""
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        raise ValueError(f"gave {found.dtype} {list(found.shape)}, expected {wanted.dtype} {list(wanted.shape)}")
    if found.dtype == torch.float8_e4m3fn:
        apart = (_ordinal(found) - _ordinal(wanted)).abs().float()
    elif found.dtype.is_floating_point:
        one, other = found.float(), wanted.float()
        apart = (one - other).abs() / other.abs().clamp_min(other.square().mean().sqrt()).clamp_min(SMALLEST_CODE**2)
    else:
        apart = (found != wanted).float()
    return apart.max().item(), apart.mean().item(), (apart != 0).float().mean().item()


def _ordinal(codes: Tensor) -> Tensor:
    """E4m3 codes by the order of their values; NaN is far from everything."""
    bits = codes.view(torch.uint8).int()
    magnitude = bits & 0x7F
    value = torch.where(bits >= 0x80, -magnitude, magnitude)
    return torch.where(magnitude == 0x7F, 1 << 20, value)


def _larger(a: float, b: float) -> float:
    """NaN counts as the largest."""
    return a if a != a or a > b else b

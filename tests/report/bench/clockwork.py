"""A target that runs on its own time, and what it is asked in the tests of this room."""

from __future__ import annotations

from collections.abc import Sequence

from arctic_trt.checkpoint.contract import plan_format
from arctic_trt.model.config import parse_config
from arctic_trt.model.mapping import plan_mapping
from arctic_trt.report.bench.plan import Arrival, plan_batches
from arctic_trt.report.bench.roofline import Traffic
from arctic_trt.report.bench.run import Memory, Round, plan_batch_rounds
from arctic_trt.report.bench.stats import Trace
from arctic_trt.report.bench.target import OnDone
from arctic_trt.report.bench.workload import RandomPrompts
from tests.support.checkpoints import TINY


class Clockwork:
    """A target whose first token takes ``first`` seconds, and every other one a tenth of a second; ``errors`` by request."""

    def __init__(self, first: Sequence[float] = (1.0,), errors: Sequence[str | None] = ()) -> None:
        self.first, self.errors = list(first), list(errors)
        self.served: list[tuple[list[Arrival], int]] = []

    def serve(self, arrivals: Sequence[Arrival], *, concurrency: int, on_done: OnDone) -> list[Trace]:
        self.served.append((list(arrivals), concurrency))
        first = self.first.pop(0) if len(self.first) > 1 else self.first[0]
        traces = []
        for arrival in arrivals:
            times = tuple(arrival.at_s + first + 0.1 * step for step in range(arrival.max_new_tokens))
            error = self.errors.pop(0) if self.errors else None
            traces.append(
                Trace(
                    arrival_s=arrival.at_s,
                    input_tokens=len(arrival.prompt.token_ids),
                    token_times_s=() if error else times,
                    output_tokens=0 if error else len(times),
                    error=error,
                )
            )
            on_done(traces[-1])
        return traces


def memory(bandwidth: float, max_batch_size: int = 8) -> Memory:
    config = parse_config(TINY)
    mapping = plan_mapping(config)
    quant = plan_format(fp8=True, kv_fp8=True, exclude_modules=(), config=config, mapping=mapping)
    return Memory(traffic=Traffic(config, mapping, quant), bandwidth=bandwidth, max_batch_size=max_batch_size)


def batches(*numbers: int, repeat: int = 1, length: int = 16) -> list[Round]:
    return plan_batch_rounds(RandomPrompts(range(99), 0), plan_batches(numbers, [length]), max_new_tokens=11, repeat=repeat)

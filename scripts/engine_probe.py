"""How fast and how large an engine is in a process that does nothing else: started by ``bench_engine`` once a round."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arctic_trt.quantize.meter import Meter
from arctic_trt.report.bench.workload import BenchPrompt, RandomPrompts
from arctic_trt.runtime.completion import Listeners
from arctic_trt.runtime.open_engine import OpenEngine, open_engine
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.sampler import Sampling


@dataclass(frozen=True)
class Load:
    """Lengths in tokens: of the one prompt, of all outputs, of the prompts of ``batch`` sequences."""

    prompt: int = 512
    output: int = 128
    batch: int = 16
    batch_prompt: int = 128


@dataclass(frozen=True)
class StepTime:
    """A step of the engine: its seconds, and the token that each of some sequences got."""

    seconds: float
    tokens: dict[int, int]


def probe(engine_dir: Path, load: Load) -> dict[str, float]:
    """Figures in tokens a second, and memory, of this very process."""
    engine = open_engine(engine_dir)
    prompts = RandomPrompts(range(engine.vocab_size), seed=0)
    complete(engine, prompts.take(1, load.prompt), 2)  # the first of everything takes longer; the peer warms up, too
    prefill = complete(engine, prompts.take(1, load.prompt), 1)
    single = decode_steps(complete(engine, prompts.take(1, 1), load.output + 1), 1)
    many = decode_steps(complete(engine, prompts.take(load.batch, load.batch_prompt), load.output + 1), load.batch)
    resident = resident_bytes()
    engine.close()
    return {
        "prefill": load.prompt / sum(step.seconds for step in prefill),
        "decode": tokens_per_s(single),
        "batch_decode": tokens_per_s(many),
        "distinct_tokens": distinct_tokens(many),
        "resident_bytes": resident,
        "peak_resident_bytes": Meter.peak_rss_bytes(),
    }


def complete(engine: OpenEngine, prompts: Sequence[BenchPrompt], output: int) -> list[StepTime]:
    """Complete ``prompts`` together, greedily and to the full ``output``."""
    steps: list[StepTime] = []
    tokens: dict[int, int] = {}
    with engine.batcher(listeners=Listeners(on_token=tokens.__setitem__)) as batcher:
        for index, prompt in enumerate(prompts):
            batcher.add(Request(index=index, prompt=prompt.token_ids, max_new_tokens=output, sampling=Sampling()))
        while not batcher.idle:
            tokens.clear()
            began = time.perf_counter()
            batcher.step()
            steps.append(StepTime(time.perf_counter() - began, dict(tokens)))
    return steps


def decode_steps(steps: Sequence[StepTime], batch: int) -> list[StepTime]:
    """The steps in which all sequences go on decoding: no prompt is in them, and nobody has left."""
    started: set[int] = set()
    kept = []
    for step in steps:
        if len(started) == len(step.tokens) == batch:
            kept.append(step)
        started |= step.tokens.keys()
    if not kept:
        raise SystemExit(f"No step decoded all {batch} sequences; give more --output_tokens.")
    return kept


def tokens_per_s(steps: Sequence[StepTime]) -> float:
    return sum(len(step.tokens) for step in steps) / sum(step.seconds for step in steps)


def distinct_tokens(steps: Sequence[StepTime]) -> float:
    """Different tokens in a step, on average."""
    return statistics.mean(len(set(step.tokens.values())) for step in steps)


def resident_bytes() -> int:
    """Of this process now, mapped files included."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


if __name__ == "__main__":
    print(json.dumps(probe(Path(sys.argv[1]), Load(**json.loads(sys.argv[2])))))

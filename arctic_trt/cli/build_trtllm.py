"""``arctic-trt build`` with TensorRT-LLM: what is printed before, while and after the ranks are built."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from arctic_trt.output import Output, duration, gigabytes

if TYPE_CHECKING:
    from arctic_trt.checkpoint.trtllm import TrtCheckpoint
    from arctic_trt.engine.config import BuildConfig
    from arctic_trt.engine.tensorrt_llm.build import Built, RankState
    from arctic_trt.engine.tensorrt_llm.plan import TrtBuildPlan
    from arctic_trt.recipes import BuildRecipe

HEARTBEAT_S = 60.0


def build_with_tensorrt_llm(
    recipe: BuildRecipe, checkpoint: TrtCheckpoint, limits: BuildConfig, output: Output, *, dry_run: bool
) -> None:
    """Plan, refuse or announce, and unless it is a dry run build."""
    from arctic_trt.engine.tensorrt_llm.build import build_trtllm_engine, check_output

    plan = _plan(recipe, checkpoint, limits, dry_run=dry_run)
    for note in _notes(plan):
        output.note(note)
    done = check_output(plan)
    if dry_run:
        _show_dry_run(plan, output)
        return
    began = time.monotonic()
    if done is not None:
        output.note(f"{plan.output_dir} already holds exactly this engine; nothing to do (--overwrite makes it again).")
        output.result(_facts(plan, 0, 0.0, complete=True))
        return
    with Progress(output, plan.world_size) as progress:
        built = build_trtllm_engine(plan, progress.update)
    _summarize(plan, built, time.monotonic() - began, output)


def _plan(recipe: BuildRecipe, checkpoint: TrtCheckpoint, limits: BuildConfig, *, dry_run: bool) -> TrtBuildPlan:
    from arctic_trt.engine.tensorrt_llm.plan import plan_trtllm_build
    from arctic_trt.engine.tensorrt_llm.versions import NEWEST, Versions, installed_versions
    from arctic_trt.machine import available_memory, query_gpus

    versions = installed_versions()
    if versions is None and dry_run:
        versions = Versions(NEWEST, None, assumed=True)
    assert versions is not None, "choose_backend has refused this"
    return plan_trtllm_build(recipe, checkpoint, limits, versions=versions, gpus=query_gpus(), available_bytes=available_memory())


def _notes(plan: TrtBuildPlan) -> list[str]:
    notes = list(plan.notes)
    if plan.versions.assumed:
        notes.append(
            f"TensorRT-LLM is not installed here: flags are checked against {plan.versions.tensorrt_llm}, this machine's GPUs "
            "and memory not at all."
        )
    if plan.crew.reason:
        notes.append(f"{plan.crew.reason}.")
    return notes


def _show_dry_run(plan: TrtBuildPlan, output: Output) -> None:
    from arctic_trt.engine.tensorrt_llm.plan import describe_plan

    described = describe_plan(plan)
    output.result(described)
    output.table(
        "Would build",
        [
            ("engine", str(plan.output_dir)),
            ("ranks", f"{', '.join(map(str, plan.ranks))} of {plan.world_size}, {plan.crew.size} at a time"),
            ("with", f"TensorRT-LLM {plan.versions.tensorrt_llm}, TensorRT {plan.versions.tensorrt or '-'}"),
            ("disk", f"about {gigabytes(described['output_bytes'])}"),
            ("host memory", f"about {gigabytes(described['worker_bytes'])} a rank at work (an estimate)"),
            ("timing cache", str(plan.timing_caches[1] or "-")),
        ],
    )
    output.text(f"\nIn one command of TensorRT-LLM's:\n  {shlex.join(described['command'])}\n\nRank by rank:")
    for words in described["rank_commands"]:
        output.text(f"  {shlex.join(words)}")


def _facts(plan: TrtBuildPlan, written: int, seconds: float, *, complete: bool) -> dict[str, Any]:
    from arctic_trt.engine.tensorrt_llm.plan import describe_plan

    described = describe_plan(plan)
    kept = ("output_dir", "backend", "ranks", "world_size", "workers", "versions", "gpus", "notes")
    return {
        **{key: described[key] for key in kept},
        "bytes_written": written,
        "seconds": round(seconds, 3),
        "complete": complete,
    }


class Progress:
    """Context manager: a live line on a terminal; a line for each change, and one a minute, in a log."""

    def __init__(self, output: Output, world_size: int) -> None:
        self._output = output
        self._world_size = world_size
        self._seen: dict[int, str] = {}
        self._spoke = time.monotonic()
        self._live: Any = None

    def __enter__(self) -> Progress:
        if self._output.terminal:
            from rich.console import Console
            from rich.status import Status

            self._live = Status("starting", console=Console(stderr=True))
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, states: Sequence[RankState]) -> None:
        """Say what has changed since the last call."""
        changed = [state for state in states if self._seen.get(state.rank) != state.status]
        for state in changed:
            self._seen[state.rank] = state.status
            self._say(rank_line(state, self._world_size))
        if self._live:
            self._live.update(summary_line(states))
        elif time.monotonic() - self._spoke > HEARTBEAT_S:
            self._say(summary_line(states))

    def _say(self, text: str) -> None:
        self._spoke = time.monotonic()
        self._output.note(text)


def rank_line(state: RankState, world_size: int) -> str:
    """A rank whose status has just changed."""
    details = {
        "building": f"on GPU {state.gpu}, log {state.log}",
        "saved": f"{gigabytes(state.num_bytes)} in {duration(state.seconds)}",
        "kept": f"{gigabytes(state.num_bytes)}, built before from the same inputs",
        "elsewhere": "another process is building it",
        "failed": f"after {duration(state.seconds)}, log {state.log}; builds under way are finished",
    }
    return f"rank {state.rank} of {world_size}  {state.status}  {details.get(state.status, '')}".rstrip()


def summary_line(states: Sequence[RankState]) -> str:
    """All ranks in one line: ``2 queued, 1 saved, building: rank 3 (12 min 05 s)``."""
    counts = Counter(state.status for state in states if state.status != "building")
    building = ", ".join(f"rank {state.rank} ({duration(state.elapsed())})" for state in states if state.status == "building")
    parts = [f"{number} {status}" for status, number in counts.items()]
    return ", ".join([*parts, f"building: {building}"] if building else parts)


def _summarize(plan: TrtBuildPlan, built: Built, seconds: float, output: Output) -> None:
    if not built.complete:
        output.note(f"{plan.output_dir} becomes an engine when all {plan.world_size} ranks are built.")
    output.result(_facts(plan, built.bytes_written, seconds, complete=built.complete))
    output.table(
        "Built",
        [
            ("engine" if built.complete else "part of", str(plan.output_dir)),
            ("backend", f"TensorRT-LLM {plan.versions.tensorrt_llm}"),
            ("ranks", f"{', '.join(map(str, plan.ranks))} of {plan.world_size}"),
            ("written", gigabytes(built.bytes_written)),
            ("time", duration(seconds)),
        ],
    )

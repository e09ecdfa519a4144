"""Building TensorRT engines: one process a rank, as many at a time as the machine holds, each with a log of its own.

A rank that is finished stays finished: whatever happens afterwards, the same command goes on with the others.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from arctic_trt.checkpoint.contract import rank_file
from arctic_trt.checkpoint.output_dir import named_errors
from arctic_trt.engine.config import check_engine_dir
from arctic_trt.engine.tensorrt_llm.engine_dir import RankRecord, SharedEngineDir
from arctic_trt.engine.tensorrt_llm.plan import TIMINGS, TrtBuildPlan, check_room, rank_command
from arctic_trt.engine.tensorrt_llm.worker import DIGEST_FILE
from arctic_trt.errors import ArcticTrtError
from arctic_trt.launch import without_launcher

QUEUED, BUILDING, SAVED, KEPT, ELSEWHERE, FAILED = "queued", "building", "saved", "kept", "elsewhere", "failed"
POLL_S = 0.1
GRACE_S = 10.0
LAST_LINES = 8


@dataclass(slots=True)
class RankState:
    """Where one rank is. ``seconds`` and ``num_bytes`` are of a finished one; ``log`` is what its process prints."""

    rank: int
    status: str = QUEUED
    gpu: int | None = None
    log: Path | None = None
    began: float = 0.0
    seconds: float = 0.0
    num_bytes: int = 0

    def elapsed(self) -> float:
        """Seconds since the build began, or that it took."""
        return time.monotonic() - self.began if self.status == BUILDING else self.seconds


@dataclass(frozen=True, slots=True)
class Built:
    """What one process has done; ``complete`` when the directory is an engine now, whoever built the other ranks."""

    states: list[RankState]
    complete: bool

    @property
    def bytes_written(self) -> int:
        return sum(state.num_bytes for state in self.states if state.status == SAVED)


OnChange = Callable[[Sequence[RankState]], None]


def open_engine_dir(plan: TrtBuildPlan) -> SharedEngineDir:
    """The output directory of ``plan``, not yet entered."""
    shards = [plan.shard(rank) for rank in range(plan.world_size)]
    return SharedEngineDir(plan.output_dir, plan.fingerprint(), shards, overwrite=plan.overwrite)


def check_output(plan: TrtBuildPlan) -> dict[int, RankRecord] | None:
    """The records of an engine that is there already and needs nothing; otherwise refuse what building would refuse."""
    check_engine_dir(plan.output_dir, plan.checkpoint.checkpoint_dir)
    out = open_engine_dir(plan)
    done = out.completed()
    if done is None or plan.overwrite:
        out.check()
        check_room(plan)
        return None
    return done


def build_trtllm_engine(plan: TrtBuildPlan, on_change: OnChange = lambda states: None) -> Built:
    """Build the ranks of ``plan`` that are not finished; the engine is complete once all ranks are, here or elsewhere.

    ``on_change`` is called in this thread whenever a rank's status changes, and between changes ten times a second. Raises
    :class:`ArcticTrtError` with the last lines of the first rank that failed, after the builds under way have ended.
    """
    with open_engine_dir(plan) as out:
        finished = out.finished()
        states = [_initial_state(rank, finished, out) for rank in plan.ranks]
        on_change(states)
        _Crew(plan, out, states, on_change).work()
        complete = out.complete([plan.checkpoint.checkpoint_dir / name for name in plan.side_files])
    return Built(states, complete)


def _initial_state(rank: int, finished: dict[int, RankRecord], out: SharedEngineDir) -> RankState:
    if rank in finished:
        return RankState(rank, KEPT, seconds=finished[rank].seconds, num_bytes=finished[rank].engine_bytes)
    return RankState(rank, QUEUED if out.take(rank) else ELSEWHERE)


@dataclass(slots=True)
class _Job:
    state: RankState
    process: subprocess.Popen[bytes]
    scratch: Path


@dataclass(slots=True)
class _Crew:
    """The processes at work; every process has a slot, and a slot a GPU."""

    plan: TrtBuildPlan
    out: SharedEngineDir
    states: list[RankState]
    on_change: OnChange
    jobs: dict[int, _Job] = field(default_factory=dict)
    failure: ArcticTrtError | None = None

    def work(self) -> None:
        queue = [state for state in self.states if state.status == QUEUED]
        try:
            while self.jobs or (queue and not self.failure):
                self._fill_slots(queue)
                self.on_change(self.states)
                self._collect()
                self.on_change(self.states)
                time.sleep(POLL_S)
        except BaseException:
            self._stop()
            raise
        if self.failure:
            raise self.failure

    def _fill_slots(self, queue: list[RankState]) -> None:
        free = [slot for slot in range(self.plan.crew.size) if slot not in self.jobs]
        while free and queue and not self.failure:
            slot = free.pop(0)
            self.jobs[slot] = self._start(queue.pop(0), slot)

    def _start(self, state: RankState, slot: int) -> _Job:
        scratch = self.out.scratch(state.rank)
        state.gpu, state.log, state.began, state.status = slot, self.out.log(state.rank), time.monotonic(), BUILDING
        command = rank_command(self.plan, state.rank, slot, scratch)
        with named_errors(state.log), state.log.open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=scratch,
                env=without_launcher(os.environ),
                start_new_session=True,  # an interrupt at the terminal is for us, who know what it must not leave behind
            )
        return _Job(state, process, scratch)

    def _collect(self) -> None:
        for slot, job in list(self.jobs.items()):
            code = job.process.poll()
            if code is None:
                continue
            del self.jobs[slot]
            state = job.state
            state.seconds, state.status = state.elapsed(), SAVED if code == 0 else FAILED
            if code == 0:
                digest = (job.scratch / DIGEST_FILE).read_text(encoding="ascii")
                self._keep_timings(state.rank, job.scratch / TIMINGS)
                state.num_bytes = self.out.accept(state.rank, digest, state.seconds).engine_bytes
            elif self.failure is None:
                self.failure = rank_failure(state, code, self.plan.shard(state.rank))

    def _keep_timings(self, rank: int, written: Path) -> None:
        target = self.plan.timing_caches[1]
        if rank == 0 and target is not None and written.is_file():
            with named_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
                shutil.copyfile(written, partial)
                os.replace(partial, target)

    def _stop(self) -> None:
        """End all builds, with whatever they have started themselves."""
        for job in self.jobs.values():
            with suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        for job in self.jobs.values():
            with suppress(subprocess.TimeoutExpired):
                job.process.wait(max(0.0, deadline - time.monotonic()))
            with suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()


def rank_failure(state: RankState, code: int, shard: Path) -> ArcticTrtError:
    """One sentence about a build that ended with ``code``, negative for a signal, with the end of its log."""
    where = f"Rank {state.rank} ({shard.parent.name}/{rank_file(state.rank)})"
    if code == -signal.SIGKILL:
        return ArcticTrtError(
            f"{where} was killed by signal 9, as the kernel does when memory runs out; {state.log} has what it said.",
            "Lower --workers and run the same command again: finished ranks are kept.",
        )
    if code < 0:
        return ArcticTrtError(
            f"{where} was ended by signal {-code}; {state.log} has what it said.",
            "Run the same command again: finished ranks are kept.",
        )
    return ArcticTrtError(
        f"{where} was not built: TensorRT-LLM ended with exit code {code}; the last lines of {state.log}: "
        f"{' | '.join(last_lines(state.log))}",
        "Finished ranks are kept.",
    )


def last_lines(path: Path | None, count: int = LAST_LINES) -> list[str]:
    """The last lines of a log that are not empty, cut to what a person reads."""
    if path is None or not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64 * 1024))
        text = file.read().decode("utf-8", errors="replace")
    return [line.strip()[:300] for line in text.splitlines() if line.strip()][-count:]

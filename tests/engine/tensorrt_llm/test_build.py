"""Builds with a stand-in for TensorRT-LLM, process by process as in truth: order, failures, interruption, timings."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.checkpoint.output_dir import JOURNAL, MARKER
from arctic_trt.checkpoint.trtllm import TrtCheckpoint
from arctic_trt.engine.config import plan_build_config, read_engine_config
from arctic_trt.engine.tensorrt_llm.build import (
    Built,
    RankState,
    build_trtllm_engine,
    check_output,
    last_lines,
    rank_failure,
)
from arctic_trt.engine.tensorrt_llm.plan import TrtBuildPlan, plan_trtllm_build
from arctic_trt.engine.tensorrt_llm.versions import installed_versions
from arctic_trt.errors import ArcticTrtError, RefusedError
from arctic_trt.machine import query_gpus
from arctic_trt.recipes import BuildRecipe
from tests.trtllm_standin.fixtures import StandIn

Plan = Callable[..., TrtBuildPlan]
Install = Callable[..., StandIn]


@pytest.fixture
def install(trtllm_standin: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    def enter(version: str = "1.2.1", **machine: Any) -> StandIn:
        standin = trtllm_standin(version, **machine)
        standin.enter(monkeypatch)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        return standin

    return enter


@pytest.fixture
def plan(tp8: Path, tmp_path: Path) -> Plan:
    def make(available: int = 10**12, **flags: Any) -> TrtBuildPlan:
        checkpoint = TrtCheckpoint(tp8)
        versions = installed_versions()
        assert versions is not None
        return plan_trtllm_build(
            BuildRecipe(checkpoint_dir=tp8, output_dir=tmp_path / "engine", **flags),
            checkpoint,
            plan_build_config(checkpoint.config),
            versions=versions,
            gpus=query_gpus(),
            available_bytes=available,
        )

    return make


class History:
    """Every status that every rank had, and the most builds at a time."""

    def __init__(self) -> None:
        self.of: dict[int, list[str]] = {}
        self.busiest = 0

    def __call__(self, states: Sequence[RankState]) -> None:
        self.busiest = max(self.busiest, sum(state.status == "building" for state in states))
        for state in states:
            seen = self.of.setdefault(state.rank, [])
            if not seen or seen[-1] != state.status:
                seen.append(state.status)


def statuses(built: Built) -> dict[int, str]:
    return {state.rank: state.status for state in built.states}


def test_all_ranks_become_an_engine(install: Install, plan: Plan, tmp_path: Path) -> None:
    standin, history = install(), History()
    built = build_trtllm_engine(plan(workers=3), history)
    engine = tmp_path / "engine"
    assert built.complete and set(statuses(built).values()) == {"saved"} and history.busiest <= 3
    assert all(seen == ["queued", "building", "saved"] for seen in history.of.values())
    calls = standin.calls("build_and_save")
    assert sorted(call["rank"] for call in calls) == list(range(8))
    assert {call["arguments"]["gpu_id"] for call in calls} <= {0, 1, 2}
    assert len({call["pid"] for call in calls}) == 8
    assert read_engine_config(engine).backend == "tensorrt_llm"
    assert sorted(path.name for path in engine.iterdir()) == [
        *("build.json", "config.json", "generation_config.json", "logs", *(f"rank{rank}.engine" for rank in range(8))),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    assert built.bytes_written == sum((engine / f"rank{rank}.engine").stat().st_size for rank in range(8))
    assert "Build TensorRT engine" in (engine / "logs" / "rank5.log").read_text()


def test_the_digests_of_the_shards_are_recorded(install: Install, plan: Plan, tp8: Path, tmp_path: Path) -> None:
    install()
    build_trtllm_engine(plan())
    record = json.loads((tmp_path / "engine" / "build.json").read_text())
    for rank in record["ranks"]:
        shard = tp8 / f"rank{rank['rank']}.safetensors"
        assert rank["digest"] == hashlib.sha256(shard.read_bytes()).hexdigest() and rank["shard_bytes"] == shard.stat().st_size
    assert (record["fingerprint"]["sm"], record["fingerprint"]["tensorrt"]) == (90, "10.14.1")


def test_parts_on_several_machines(install: Install, plan: Plan, tmp_path: Path) -> None:
    standin = install()
    first = build_trtllm_engine(plan(ranks="4-7"))
    assert not first.complete and (tmp_path / "engine" / MARKER).exists()
    second = build_trtllm_engine(plan(ranks="0-3"))
    assert second.complete and statuses(second) == dict.fromkeys(range(4), "saved")
    assert sorted(call["rank"] for call in standin.calls("build_and_save")) == list(range(8))


def test_a_finished_rank_is_not_built_again(install: Install, plan: Plan) -> None:
    standin = install()
    build_trtllm_engine(plan(ranks="0-5"))
    built = build_trtllm_engine(plan())
    assert statuses(built) == {**dict.fromkeys(range(6), "kept"), 6: "saved", 7: "saved"} and built.complete
    assert len(standin.calls("build_and_save")) == 8
    assert check_output(plan()) is not None, "there is nothing left to do"
    with pytest.raises(RefusedError, match="is not empty"):
        check_output(plan(moe_plugin="disable"))


def test_a_rank_that_fails_is_named_with_its_last_words(install: Install, plan: Plan, tmp_path: Path) -> None:
    install(fail_rank=3)
    history = History()
    with pytest.raises(ArcticTrtError, match=r"Rank 3 \(checkpoint/rank3\.safetensors\) was not built.*RuntimeError") as caught:
        build_trtllm_engine(plan(workers=2), history)
    assert "logs/rank3.log" in str(caught.value) and caught.value.exit_code == 1
    assert history.of[3][-1] == "failed" and history.of[7] == ["queued"], "nothing new was begun"
    assert not (tmp_path / "engine" / "config.json").exists()
    os.environ.pop("TRTLLM_STANDIN_FAIL_RANK")
    built = build_trtllm_engine(plan())
    assert built.complete and {statuses(built)[rank] for rank in range(3)} == {"kept"}


def test_a_rank_that_is_killed_is_explained(install: Install, plan: Plan) -> None:
    install(die_rank=0)
    with pytest.raises(ArcticTrtError, match=r"Rank 0 .* killed by signal 9, as the kernel does when memory runs out.*--workers"):
        build_trtllm_engine(plan(workers=1))


def test_an_interrupt_stops_the_builds_and_keeps_what_is_finished(install: Install, plan: Plan, tmp_path: Path) -> None:
    install(sleep=30)
    pids: list[int] = []

    def interrupt(states: Sequence[RankState]) -> None:
        pids[:] = children()
        if len(pids) == 2:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build_trtllm_engine(plan(workers=2), interrupt)
    assert time.monotonic() - began < 20 and children() == []
    assert (tmp_path / "engine" / MARKER).exists()
    os.environ.pop("TRTLLM_STANDIN_SLEEP")
    assert build_trtllm_engine(plan()).complete


def children() -> list[int]:
    path = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return [int(pid) for pid in path.read_text().split() if worker(int(pid))]


def worker(pid: int) -> bool:
    try:
        return b"tensorrt_llm.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def test_builds_die_with_the_process_that_started_them(install: Install, tp8: Path, tmp_path: Path) -> None:
    standin = install(sleep=60)
    words = ["build", "--backend", "tensorrt_llm", "--checkpoint_dir", str(tp8), "--output_dir", str(tmp_path / "engine")]
    process = subprocess.Popen([sys.executable, "-m", "arctic_trt", *words, "--workers", "1"], env=standin.env)
    try:
        deadline = time.monotonic() + 30
        while not standin.calls("build_and_save"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    pid = standin.calls("build_and_save")[0]["pid"]
    deadline = time.monotonic() + 10
    while worker(pid) and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the build lives on"
        time.sleep(0.05)


def test_timings_are_read_by_all_ranks_and_written_by_the_first(install: Install, plan: Plan, tmp_path: Path) -> None:
    standin = install()
    cache = tmp_path / "cache" / "arctic-trt" / "NVIDIA-H100-80GB-HBM3-sm90-trt10.14.1.cache"
    build_trtllm_engine(plan())
    assert cache.is_file() and [path.name for path in cache.parent.iterdir()] == [cache.name]
    first = standin.calls("main")
    assert all(call["arguments"]["input_timing_cache"] in (None, str(cache)) for call in first)
    build_trtllm_engine(plan(overwrite=True, moe_plugin="disable"))
    second = standin.calls("main")[len(first) :]
    assert len(second) == 8 and {call["arguments"]["input_timing_cache"] for call in second} == {str(cache)}
    assert str(cache) not in {call["arguments"]["output_timing_cache"] for call in second}, "it is replaced as a whole"


def test_a_child_is_no_rank_of_our_job(install: Install, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    monkeypatch.setenv("PMIX_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert build_trtllm_engine(plan(ranks="0")).states[0].status == "saved"


def test_an_engine_that_is_too_large_for_the_disk_is_refused(
    install: Install, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(RefusedError, match=r"needs .* GB, but its disk has 0\.00 GB free"):
        check_output(plan())


def test_the_checkpoint_is_not_overwritten_by_its_engine(install: Install, plan: Plan, tp8: Path) -> None:
    install()
    with pytest.raises(RefusedError, match="is the checkpoint itself"):
        check_output(replace(plan(), output_dir=tp8, overwrite=True))


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (1, r"ended with exit code 1; the last lines of .*rank2\.log: one \| two"),
        (-9, "killed by signal 9"),
        (-15, "ended by signal 15"),
    ],
)
def test_sentences_about_failures(code: int, sentence: str, tmp_path: Path) -> None:
    log = tmp_path / "rank2.log"
    log.write_text("\n\none\n  two  \n\n")
    error = rank_failure(RankState(2, "failed", log=log), code, Path("ckpt/rank2.safetensors"))
    assert re.search(sentence, str(error)) and "Rank 2 (ckpt/rank2.safetensors)" in str(error)


def test_the_end_of_a_long_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 200_000 + b"\n" + "\n".join(f"line {index}" for index in range(50)).encode() + b"\n\xff\n")
    assert last_lines(log, 3) == ["line 48", "line 49", "\N{REPLACEMENT CHARACTER}"]
    assert last_lines(tmp_path / "none") == [] and last_lines(None) == []


def test_nothing_is_left_of_the_scratch(install: Install, plan: Plan, tmp_path: Path) -> None:
    install()
    build_trtllm_engine(plan())
    assert not (tmp_path / "engine" / JOURNAL).exists()

"""What a build will do: ranks, how many at a time, command lines, and the machines that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.checkpoint.trtllm import TrtCheckpoint
from arctic_trt.engine.config import plan_build_config
from arctic_trt.engine.tensorrt_llm.plan import (
    Crew,
    TrtBuildPlan,
    check_gpus,
    describe_plan,
    parse_ranks,
    plan_crew,
    plan_trtllm_build,
    rank_command,
)
from arctic_trt.engine.tensorrt_llm.versions import Versions
from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.machine import Gpu
from arctic_trt.recipes import BuildRecipe
from tests.support.jobs import quantize

H100 = Gpu(
    index=0, name="NVIDIA H100 80GB HBM3", compute_capability=(9, 0), memory_bytes=85 << 30, free_bytes=80 << 30, driver="580"
)
A100 = replace(H100, name="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0))
V121 = Versions("1.2.1", "10.14.1")
GB = 10**9
Make = Callable[..., TrtBuildPlan]


def node(kind: Gpu = H100, count: int = 8) -> list[Gpu]:
    return [replace(kind, index=index) for index in range(count)]


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tiny_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plan") / "checkpoint"
    quantize(tiny_model, directory, calib_dataset=str(tiny_samples), tp_size=8)
    return directory


@pytest.fixture
def make(checkpoint: Path, tmp_path: Path) -> Make:
    def plan(versions: Versions = V121, gpus: list[Gpu] | None = None, available: int = 10**12, **flags: Any) -> TrtBuildPlan:
        opened = TrtCheckpoint(checkpoint)
        return plan_trtllm_build(
            BuildRecipe(checkpoint_dir=checkpoint, output_dir=tmp_path / "engine", **flags),
            opened,
            plan_build_config(opened.config),
            versions=versions,
            gpus=node() if gpus is None else gpus,
            available_bytes=available,
        )

    return plan


def test_all_ranks_one_a_gpu(make: Make) -> None:
    plan = make()
    assert plan.ranks == tuple(range(8)) and plan.crew == Crew(8) and plan.notes == ()
    assert [path.name for path in map(plan.shard, range(8))] == [f"rank{rank}.safetensors" for rank in range(8)]


def test_a_part_on_this_machine(make: Make) -> None:
    plan = make(ranks="4-7")
    assert plan.ranks == (4, 5, 6, 7) and plan.crew.size == 4 and plan.world_size == 8


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        (None, tuple(range(8))),
        ("0-3", (0, 1, 2, 3)),
        ("5", (5,)),
        ("0,2,4-7", (0, 2, 4, 5, 6, 7)),
        ("3-4, 3", (3, 4)),
        ("7-7", (7,)),
    ],
)
def test_lists_of_ranks(text: str | None, ranks: tuple[int, ...]) -> None:
    assert parse_ranks(text, 8) == ranks


@pytest.mark.parametrize("text", ["", "a", "1-", "-3", "1--2", "0;1", "3-1", "8", "0-8"])
def test_lists_of_ranks_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--ranks"):
        parse_ranks(text, 8)


@given(st.sets(st.integers(0, 15), min_size=1))
def test_any_set_of_ranks_can_be_written(ranks: set[int]) -> None:
    assert parse_ranks(",".join(map(str, ranks)), 16) == tuple(sorted(ranks))


@pytest.mark.parametrize(
    ("asked", "ranks", "gpus", "available", "size", "reason"),
    [
        (8, 8, 8, 2000, 8, ""),
        (8, 8, 8, 1000, 5, "1000 GB of host memory are free and a build takes about 180 GB: 5 ranks at a time instead of 8"),
        (8, 8, 8, 190, 1, "1 ranks at a time instead of 8"),
        (8, 8, 8, 150, 1, "one rank at a time, and it may still be killed"),
        (8, 8, 4, 2000, 4, "there are 4 GPUs: 4 ranks at a time instead of 8"),
        (8, 4, 8, 2000, 4, ""),
        (2, 8, 8, 2000, 2, ""),
    ],
)
def test_host_memory_and_gpus_decide_how_many_at_a_time(
    asked: int, ranks: int, gpus: int, available: int, size: int, reason: str
) -> None:
    crew = plan_crew(asked, ranks=ranks, gpus=gpus, available=available * GB, shard=60 * GB)
    assert crew.size == size and reason in crew.reason and bool(crew.reason) == bool(reason)


def test_a_machine_on_which_not_one_build_fits_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"64 GB of host memory are free and a build takes about 180 GB, at least 120 GB"):
        plan_crew(8, ranks=8, gpus=8, available=64 * GB, shard=60 * GB)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16), st.integers(10**9, 10**13), st.integers(10**6, 10**11))
def test_a_crew_never_exceeds_what_there_is(asked: int, ranks: int, gpus: int, available: int, shard: int) -> None:
    try:
        crew = plan_crew(asked, ranks=ranks, gpus=gpus, available=available, shard=shard)
    except RefusedError:
        assert available < 2 * shard
        return
    assert 1 <= crew.size <= min(asked, ranks, gpus)
    assert crew.size == 1 or crew.size * 3 * shard <= available
    assert crew.reason or crew.size == min(asked, ranks)


def test_machines_that_cannot_build() -> None:
    with pytest.raises(RefusedError, match="this machine shows none"):
        check_gpus([], fp8=True)
    with pytest.raises(RefusedError, match="different GPUs, NVIDIA A100-SXM4-80GB and NVIDIA H100"):
        check_gpus([H100, A100], fp8=True)
    with pytest.raises(RefusedError, match=r"A100.*\(SM 80\) has no FP8 tensor cores"):
        check_gpus([A100], fp8=True)
    check_gpus([A100], fp8=False)
    check_gpus([H100], fp8=True)


def test_a_dry_run_without_the_library_looks_at_neither_gpus_nor_memory(make: Make) -> None:
    plan = make(Versions("1.2.1", None, assumed=True), gpus=[], available=0)
    assert plan.crew.size == 8 and plan.timing_caches == (None, None)


def test_flags_are_held_to_the_version(make: Make) -> None:
    assert make(Versions("1.1.0", "10.13.3"), cluster_key="H100-SXM").arguments["cluster_key"] == "H100-SXM"
    with pytest.raises(UsageError, match=r"--cluster_key was removed in TensorRT-LLM 1\.2"):
        make(cluster_key="H100-SXM")
    with pytest.raises(RefusedError, match=r"1\.3\.0rc22"):
        make(Versions("1.3.0rc22", None))


def test_timings_are_kept_for_each_kind_of_gpu(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = tmp_path / "arctic-trt" / "NVIDIA-H100-80GB-HBM3-sm90-trt10.14.1.cache"
    assert make().timing_caches == (expected, expected)
    assert make(timing_cache_dir=tmp_path / "x").timing_caches[0] == tmp_path / "x" / expected.name
    mine = tmp_path / "mine"
    with pytest.raises(UsageError, match=r"--input_timing_cache .*mine does not exist"):
        make(input_timing_cache=mine)
    mine.touch()
    assert make(input_timing_cache=mine).timing_caches == (mine, expected)
    assert make(Versions("1.2.1", None)).timing_caches == (None, None)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make().timing_caches[0] == tmp_path / ".cache" / "arctic-trt" / expected.name


def test_the_command_of_a_rank(make: Make, tmp_path: Path) -> None:
    plan = make(timing_cache_dir=tmp_path)
    assert "--input_timing_cache" not in rank_command(plan, 3, 1, tmp_path / "scratch"), "there is none yet"
    [cache] = {*plan.timing_caches}
    assert cache is not None
    cache.touch()
    words = rank_command(plan, 3, 1, tmp_path / "scratch")
    assert words[1:6] == ["-m", "arctic_trt.engine.tensorrt_llm.worker", "3", "1", str(plan.shard(3).absolute())]
    flags = dict(zip(words[6::2], words[7::2], strict=True))
    assert flags["--output_dir"] == str(tmp_path / "scratch") and Path(flags["--checkpoint_dir"]).is_absolute()
    assert flags["--input_timing_cache"] == str(cache)
    assert flags["--output_timing_cache"] == str(tmp_path / "scratch" / "timing.cache")
    assert flags["--gemm_plugin"] == "bfloat16" and flags["--max_batch_size"] == "256"


def test_the_fingerprint_is_of_everything_but_the_weights(make: Make) -> None:
    same = make().fingerprint()
    assert make(workers=2, ranks="0").fingerprint() == same
    different = [
        make(moe_plugin="disable"),
        make(gpus=node(replace(H100, name="NVIDIA H200", compute_capability=(9, 0)))),
        make(Versions("1.2.0", "10.14.1")),
        make(Versions("1.2.1", "10.14.2")),
    ]
    assert all(plan.fingerprint() != same for plan in different)
    assert json.loads(json.dumps(same)) == same


def test_a_plan_as_an_object(make: Make) -> None:
    plan = make(workers=4, ranks="0-5")
    found = describe_plan(plan)
    assert json.loads(json.dumps(found)) == found
    assert found["command"][0] == "trtllm-build" and found["command"][-2:] == ["--workers", "4"]
    assert len(found["rank_commands"]) == 6
    assert found["output_bytes"] == sum(plan.shard_bytes[:6]) and found["worker_bytes"] == 3 * max(plan.shard_bytes[:6])

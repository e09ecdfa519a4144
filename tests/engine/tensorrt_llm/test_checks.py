"""What is looked at before an engine is loaded, each time with what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.engine.tensorrt_llm.checks import (
    EngineFacts,
    check_gpus,
    check_host_memory,
    check_options,
    check_versions,
    read_engine_facts,
)
from arctic_trt.engine.tensorrt_llm.session import RuntimeOptions
from arctic_trt.engine.tensorrt_llm.versions import Versions
from arctic_trt.errors import CheckpointError, RefusedError, UsageError
from arctic_trt.machine import Gpu

GB = 10**9
ENGINE = EngineFacts(
    engine_dir=Path("engine"),
    version="1.2.1",
    tensorrt="10.14.1",
    sm=90,
    gpu="NVIDIA H100 80GB HBM3",
    rank_bytes=(60 * GB,) * 8,
    plugin_config={"use_paged_context_fmha": True},
    gathers_context_logits=False,
    gathers_generation_logits=False,
    pp_size=1,
)
H100 = Gpu(
    index=0, name="NVIDIA H100 80GB HBM3", compute_capability=(9, 0), memory_bytes=85 * GB, free_bytes=84 * GB, driver="580"
)
NODE = [replace(H100, index=index) for index in range(8)]


def engine_dir(tmp_path: Path, record: Any = None, ranks: int = 2, **build_config: Any) -> Path:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "version": "1.2.1",
                "pretrained_config": {"mapping": {"pp_size": 1}},
                "build_config": {"plugin_config": {}} | build_config,
            }
        )
    )
    for rank in range(ranks):
        (tmp_path / f"rank{rank}.engine").write_bytes(bytes(10 + rank))
    if record is not None:
        (tmp_path / "build.json").write_text(record if isinstance(record, str) else json.dumps(record))
    return tmp_path


def test_what_our_own_build_recorded_is_known(tmp_path: Path) -> None:
    record = {
        "fingerprint": {"tensorrt": "10.14.1", "sm": 90, "gpu": "H100"},
        "ranks": [{"rank": 0, "engine_bytes": 10}, {"rank": 1, "engine_bytes": 11}],
    }
    found = read_engine_facts(engine_dir(tmp_path, record, gather_context_logits=True), 2)
    assert (found.version, found.tensorrt, found.sm, found.gpu, found.rank_bytes) == ("1.2.1", "10.14.1", 90, "H100", (10, 11))
    assert found.gathers_context_logits and not found.gathers_generation_logits


def test_an_engine_of_trtllm_build_alone_has_no_record(tmp_path: Path) -> None:
    found = read_engine_facts(engine_dir(tmp_path), 2)
    assert (found.tensorrt, found.sm, found.rank_bytes) == (None, None, (10, 11))


def test_engine_files_that_are_missing_or_cut_short(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rank2\.engine does not exist"):
        read_engine_facts(engine_dir(tmp_path), 3)
    with pytest.raises(CheckpointError, match=r"rank1\.engine has 11 bytes, expected 12"):
        read_engine_facts(engine_dir(tmp_path, {"ranks": [{"rank": 1, "engine_bytes": 12}]}), 2)
    with pytest.raises(CheckpointError, match=r"build\.json is not valid JSON"):
        read_engine_facts(engine_dir(tmp_path, "{"), 2)


def test_versions_that_fit() -> None:
    assert check_versions(ENGINE, Versions("1.2.1", "10.14.1")) == []
    assert check_versions(replace(ENGINE, tensorrt=None), Versions("1.2.1", "10.99")) == []
    [doubt] = check_versions(ENGINE, Versions("1.2.0", "10.14.1"))
    assert "was built with TensorRT-LLM 1.2.1, 1.2.0 is installed" in doubt


@pytest.mark.parametrize(
    ("versions", "complaint"),
    [
        (Versions("1.1.0", "10.14.1"), r"built with TensorRT-LLM 1\.2\.1, 1\.1\.0 is installed\. Install tensorrt-llm==1\.2\.1"),
        (Versions("1.2.1", "10.13.3"), r"built with TensorRT 10\.14\.1, 10\.13\.3 is installed.*Build the engine again"),
        (Versions("1.3.0rc22", None), "engines were removed"),
    ],
)
def test_versions_that_do_not_fit(versions: Versions, complaint: str) -> None:
    with pytest.raises(RefusedError, match=complaint):
        check_versions(ENGINE, versions)


def test_every_local_rank_has_a_gpu_of_the_right_kind_with_room() -> None:
    check_gpus(ENGINE, NODE, 8)
    check_gpus(ENGINE, NODE[:4], 4)
    check_gpus(replace(ENGINE, sm=None), [replace(H100, compute_capability=(8, 9))] * 8, 8)
    check_gpus(ENGINE, [replace(H100, memory_bytes=0, free_bytes=0)] * 8, 8)  # the driver does not say


@pytest.mark.parametrize(
    ("gpus", "complaint"),
    [
        ([], "8 ranks were started on this machine, which shows 0 GPUs"),
        (NODE[:4], "shows 4 GPUs; each rank needs one"),
        (
            [*NODE[:7], replace(H100, index=7, name="L40S", compute_capability=(8, 9))],
            r"built for SM 90 .*GPU 7 is SM 89 \(L40S\)",
        ),
        (
            [*NODE[:7], replace(H100, index=7, free_bytes=20 * GB)],
            r"GPU 7 .* has 20\.0 GB free, the weights of a rank take 60\.0",
        ),
    ],
)
def test_gpus_that_do_not_do(gpus: list[Gpu], complaint: str) -> None:
    with pytest.raises(RefusedError, match=complaint):
        check_gpus(ENGINE, gpus, 8)


def test_host_memory_for_all_local_ranks_at_once() -> None:
    check_host_memory(ENGINE, 480 * GB, 8, RuntimeOptions())
    check_host_memory(ENGINE, 240 * GB, 4, RuntimeOptions())
    with pytest.raises(RefusedError, match=r"Loading 8 ranks reads 480 GB of engines at once, 400 GB .*--use_gpu_direct_storage"):
        check_host_memory(ENGINE, 400 * GB, 8, RuntimeOptions())
    check_host_memory(ENGINE, GB, 8, RuntimeOptions(use_gpu_direct_storage=True))
    check_host_memory(ENGINE, GB, 8, RuntimeOptions(no_memory_check=True))


@pytest.mark.parametrize(
    ("changes", "options", "prompt_logits", "complaint"),
    [
        ({}, {"kv_cache_free_gpu_memory_fraction": 0.0}, False, "--kv_cache_free_gpu_memory_fraction 0.0 is out of range"),
        ({}, {"kv_cache_free_gpu_memory_fraction": 1.0}, False, "between 0 and 1"),
        ({}, {"gpu_weights_percent": 80.0}, False, "--gpu_weights_percent 80.0 is out of range"),
        (
            {"plugin_config": {"use_paged_context_fmha": False}},
            {"enable_chunked_context": True},
            False,
            "--enable_chunked_context needs an engine with paged context attention",
        ),
        (
            {"plugin_config": {"use_paged_context_fmha": False}},
            {"kv_cache_enable_block_reuse": True},
            False,
            "Build it with --use_paged_context_fmha enable",
        ),
        ({}, {}, True, "--output_logits_npy needs the prompts' logits.*Build it with --gather_context_logits"),
        ({"pp_size": 2, "gathers_context_logits": True}, {}, False, "gathers logits over 2 stages.*waits forever"),
        ({"pp_size": 2, "gathers_generation_logits": True}, {}, False, "gathers logits over 2 stages"),
    ],
)
def test_options_that_the_engine_was_not_built_for(
    changes: dict[str, Any], options: dict[str, Any], prompt_logits: bool, complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        check_options(replace(ENGINE, **changes), RuntimeOptions(**options), prompt_logits=prompt_logits)


def test_options_that_it_was_built_for() -> None:
    options = RuntimeOptions(
        kv_cache_free_gpu_memory_fraction=0.5,
        enable_chunked_context=True,
        kv_cache_enable_block_reuse=True,
        gpu_weights_percent=1.0,
    )
    check_options(replace(ENGINE, gathers_context_logits=True), options, prompt_logits=True)
    assert options.given() == [
        "kv_cache_free_gpu_memory_fraction",
        "kv_cache_enable_block_reuse",
        "enable_chunked_context",
        "gpu_weights_percent",
    ]
    assert RuntimeOptions().given() == []

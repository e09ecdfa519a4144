"""The measurement of one rank: in a size that a CPU does in a second, and by traces made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from arctic_trt.model.mapping import plan_mapping
from arctic_trt.report.arctic import RELEASED
from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.cuda.library import Thresholds
from tests.support.engines import ROOT
from tests.support.scripts import load_script

bench_rank, device_trace, rank_probe = (load_script(name) for name in ("bench_rank", "device_trace", "rank_probe"))
RANK = plan_mapping(RELEASED, tp_size=8).rank(0)


def measure(*words: object) -> dict[str, Any]:
    script = ROOT / "scripts" / "bench_rank"
    done = subprocess.run(
        [sys.executable, script, "--size", "small", "--context", "48", "--json", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would take the GPU")
def test_every_kind_of_step_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    found = measure("--all_reduce_us", 10, "--all_reduce_us", 3, "--out", out)
    assert found["sums_a_step"] == 5 and "nothing here is a measurement" in found["device"]
    kinds = [(row["kind"], row["sequences"], row["tokens"]) for row in found["rows"]]
    assert kinds == [("decode", 1, 1), ("decode", 2, 2), ("prefill", 1, 16), ("prefill", 1, 40)]
    for row in found["rows"]:
        seconds = row["step_ms"] / 1e3
        for cost in ("10", "3"):
            assert row["projected_tokens_per_s"][cost] == pytest.approx(row["tokens"] / (seconds + 5e-6 * int(cost)))
        assert row["bandwidth_share"] == pytest.approx(row["bytes"] / seconds / 1e9 / found["bandwidth_gb_s"])
        assert row["host_ms"] <= row["step_ms"] and row["device_ms"] is None and row["parts"] == []
    header, *rows = map(json.loads, out.read_text().splitlines())
    assert rows == found["rows"] and header["fp8_tflop_s"] == found["fp8_tflop_s"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would take the GPU")
def test_what_there_is_no_time_for_is_left_out() -> None:
    done = CliRunner().invoke(bench_rank.main, ["--size", "small", "--context", "48", "--limit_s", "0", "--json"])
    assert json.loads(done.stdout)["rows"] == [] and "4 steps are left out" in done.stderr


@pytest.mark.parametrize(
    ("only", "steps", "rows"),
    [
        (None, None, [("decode", 1), ("decode", 2), ("prefill", 16), ("prefill", 40)]),
        ("decode", None, [("decode", 1), ("decode", 2)]),
        ("prefill", "40", [("prefill", 40)]),
        (None, "1, 40", [("decode", 1), ("prefill", 40)]),
    ],
)
def test_which_steps(only: str | None, steps: str | None, rows: list[tuple[str, int]]) -> None:
    assert bench_rank.plan_rows("small", only, steps) == rows


@pytest.mark.parametrize(("only", "steps"), [(None, "3"), ("decode", "40"), (None, "1,x"), (None, "")])
def test_steps_that_there_are_none_of(only: str | None, steps: str) -> None:
    with pytest.raises(click.UsageError, match=r"expected some of \[1, 2\] for decode and \[16, 40\] for prefill"):
        bench_rank.plan_rows("small", only, steps)


def test_a_token_reads_its_two_experts_and_all_that_is_dense() -> None:
    """The figure for all eight ranks is 17.35 GB without keys and values; the embedding is not read."""
    one = rank_probe.traffic_of(RELEASED, RANK, 1, 1, 2048)
    weights = one.bytes - 2 * 35 * 1 * 128 * 2048
    assert one.parts["attention"] == one.bytes - weights
    assert 8 * weights == pytest.approx(17.4e9, rel=0.06)
    assert one.parts["experts"] == pytest.approx(35 * 2 * 3 * 608 * 7168, rel=1e-3)
    assert one.parts["router"] == 35 * 128 * 7168 * 2 and one.parts["norms"] == (35 * 3 + 1) * 7168 * 2
    many = rank_probe.traffic_of(RELEASED, RANK, 2048, 1, 2048)
    assert many.bytes > 25 * one.bytes and many.flops == pytest.approx(2048 * one.flops, rel=0.02)


def test_tokens_are_those_that_the_rank_embeds() -> None:
    """Others are zeros without the other ranks, and all experts alike to them."""
    rank = plan_mapping(rank_probe.SMALL, tp_size=8).rank(0)
    config, cpu = rank_probe.SMALL, rank_probe.CPU
    ops = rank_probe.choose_ops(config, rank, cpu, Thresholds())
    network = rank_probe.make_network(config, rank, ops, cpu, room=KvRoom(8), max_seq_len=64, graphs=[])
    step, _ = rank_probe.steps_of(2, 60, 60, KvRoom(8), network)
    tokens = {token for chunk in step.chunks for token in chunk.tokens}
    assert max(tokens) < len(network.weights.embedding) and len(tokens) > 50


# --- the profiler's traces


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: int) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


TRACE = [
    event("user_annotation", "step", 100, 100),
    event("user_annotation", "norm", 105, 10),
    event("user_annotation", "expert_gated", 120, 30),
    event("user_annotation", "all_reduce", 130, 10),
    event("cuda_runtime", "cudaMemcpyAsync", 101, 1, correlation=1),
    event("cuda_driver", "cuLaunchKernelEx", 106, 1, correlation=2),
    event("cuda_driver", "cuLaunchKernelEx", 121, 1, correlation=3),
    event("cuda_runtime", "cudaLaunchKernel", 131, 1, correlation=4),
    event("cuda_driver", "cuLaunchKernelEx", 145, 1, correlation=5),
    event("cuda_runtime", "cudaDeviceSynchronize", 210, 50),
    event("cuda_runtime", "cudaEventQuery", 150, 1, tid=2),
    event("gpu_memcpy", "Memcpy HtoD", 110, 2, tid=7, correlation=1),
    event("kernel", "project_kernel", 150, 6, tid=7, correlation=3),
    event("kernel", "norm_kernel", 140, 4, tid=7, correlation=2),
    event("kernel", "elementwise", 160, 1, tid=8, correlation=4),
    event("kernel", "project_kernel", 170, 10, tid=7, correlation=5),
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
]


def test_kernels_are_of_the_operation_that_launched_them() -> None:
    kernels = device_trace.kernels_of(TRACE)
    assert [(kernel.name, kernel.us, kernel.range) for kernel in kernels] == [
        ("Memcpy HtoD", 2, ""),
        ("norm_kernel", 4, "norm"),
        ("project_kernel", 6, "expert_gated"),
        ("elementwise", 1, "all_reduce"),
        ("project_kernel", 10, "expert_gated"),
    ]
    assert device_trace.span_us(kernels) == 70 and device_trace.span_us([]) == 0


def test_calls_are_those_of_the_step_s_own_thread() -> None:
    """The profiler itself waits for the device, afterwards."""
    assert device_trace.driver_calls(TRACE) == {"cudaMemcpyAsync": 1, "cuLaunchKernelEx": 3, "cudaLaunchKernel": 1}


def test_the_profiler_s_own_words_are_understood() -> None:
    class Ops:
        answer = 42

        def double(self, x: torch.Tensor) -> torch.Tensor:
            return x + x

    ops = device_trace.Named(Ops())
    events = device_trace.record(lambda: ops.double(torch.ones(3)))
    assert ops.answer == 42
    step, inner = (
        next(each for each in events if each["name"] == name and each["cat"] == "user_annotation") for name in ("step", "double")
    )
    assert step["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= step["ts"] + step["dur"] and step["tid"] == inner["tid"]


def test_parts_of_a_step() -> None:
    traffic = rank_probe.Traffic({"experts": 32_000, "norms": 800}, flops=48_000_000)
    kernels = device_trace.kernels_of(TRACE)
    parts = bench_rank.by_part(kernels, traffic)
    assert [(row["part"], row["launches"], row["us"], row["gb_s"]) for row in parts] == [
        ("experts", 2, 16, pytest.approx(2.0)),
        ("norms", 1, 4, pytest.approx(0.2)),
        ("rest", 1, 2, None),
        ("sums", 1, 1, None),
    ]
    assert sum(row["share"] for row in parts) == pytest.approx(1)
    assert bench_rank.markdown(parts).splitlines()[2:4] == [
        "| experts | 2 | 16.0 | 69.6% | 2 |",
        "| norms | 1 | 4.0 | 17.4% | 0 |",
    ]
    machine = bench_rank.Machine(bandwidth=1e9, fp8=6e12)
    assert bench_rank.gemm(kernels, traffic, machine) == {"gemm_ms": 0.016, "gemm_fp8_share": pytest.approx(0.5)}
    assert bench_rank.gemm([], traffic, machine) == {"gemm_ms": None, "gemm_fp8_share": None}


def test_shares_are_of_the_device_s_time_where_it_is_known() -> None:
    traffic, machine = rank_probe.Traffic({"experts": 4_000_000}, flops=8_000_000), bench_rank.Machine(bandwidth=8e9, fp8=1e10)
    times = bench_rank.Times(step=2e-3, host=1e-3)
    shares = [
        (row["step_ms"], row["device_ms"], row["host_ms"], row["bandwidth_share"], row["fp8_share"])
        for row in (bench_rank.figures(times, device, traffic, machine) for device in (1e-3, None))
    ]
    assert shares == [(2.0, 1.0, 1.0, 0.5, pytest.approx(0.8)), (2.0, None, 1.0, 0.25, pytest.approx(0.4))]

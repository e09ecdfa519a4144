"""The measurement of one rank, in a size that a CPU does in a second."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from arctic_trt.model.mapping import plan_mapping
from arctic_trt.report.arctic import RELEASED
from tests.support.engines import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from rank_probe import traffic_of

RANK = plan_mapping(RELEASED, tp_size=8).rank(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would take the GPU")
def test_every_kind_of_step_is_measured() -> None:
    words = [
        sys.executable,
        ROOT / "scripts" / "bench_rank",
        "--size",
        "small",
        "--context",
        "48",
        "--all_reduce_us",
        "10",
        "--json",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True)
    found = json.loads(done.stdout)
    assert found["sums_a_step"] == 5 and "nothing here is a measurement" in found["device"]
    kinds = [(row["kind"], row["sequences"], row["tokens"]) for row in found["rows"]]
    assert kinds == [("decode", 1, 1), ("decode", 2, 2), ("prefill", 1, 16), ("prefill", 1, 40)]
    for row in found["rows"]:
        seconds = row["step_ms"] / 1e3
        assert row["projected_tokens_per_s"] == pytest.approx(row["tokens"] / (seconds + 50e-6))
        assert row["bandwidth_share"] == pytest.approx(row["bytes"] / seconds / 1e9 / found["bandwidth_gb_s"])


def test_a_token_reads_its_two_experts_and_all_that_is_dense() -> None:
    """The figure for all eight ranks is 17.35 GB without keys and values; the embedding is not read."""
    one = traffic_of(RELEASED, RANK, 1, 1, 2048)
    assert 8 * one.weights == pytest.approx(17.4e9, rel=0.06)
    assert one.kv_cache == 2 * 35 * 1 * 128 * 2048
    many = traffic_of(RELEASED, RANK, 2048, 1, 2048)
    assert many.weights > 25 * one.weights and many.flops == pytest.approx(2048 * one.flops, rel=0.02)

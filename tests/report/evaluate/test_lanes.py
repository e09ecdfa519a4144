"""What a lane takes from which source, and what a layer computes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arctic_trt.model.layer import ignore
from arctic_trt.report.evaluate.lanes import SITES, EngineArithmetic, Lane, Pair, PairedStream, pick_dense, plan_lanes, probe_of
from arctic_trt.report.evaluate.sources import DenseProjections, Source, open_source


@pytest.fixture
def sources(checkpoints: Callable[..., Path], model: Path) -> tuple[Source, Source]:
    """(reference, candidate)."""
    return open_source(model), open_source(checkpoints(tp_size=2))


def layer_of(sources: tuple[Source, Source]) -> Pair[DenseProjections]:
    memory = torch.empty(sources[0].buffer_bytes(1, None), dtype=torch.uint8)
    return Pair(sources[0].dense(1, memory), sources[1].dense(1, memory.new_empty(0)))


def test_each_site_comes_from_where_it_should(sources: tuple[Source, Source]) -> None:
    pair = layer_of(sources)
    of_site = {
        "attention": ("qkv", "dense"),
        "residual_mlp": ("residual_fc", "residual_proj"),
        "kv_cache": ("kv_scale",),
        "experts": (),
    }
    for site in SITES:
        picked = pick_dense(pair, frozenset({site}))
        for name in ("small", "qkv", "dense", "residual_fc", "residual_proj", "kv_scale"):
            source = pair.candidate if name in of_site[site] else pair.reference
            assert getattr(picked, name) is getattr(source, name), f"{name} of the lane {site}"
    assert pick_dense(pair, None) is pair.candidate and pick_dense(pair, frozenset()) is pair.reference


def test_lanes_are_those_that_a_question_needs() -> None:
    assert plan_lanes(reference=True, candidate=False, sensitivity=False) == [Lane("reference", frozenset())]
    assert plan_lanes(reference=False, candidate=True, sensitivity=False) == [Lane("candidate", None)]
    lanes = plan_lanes(reference=True, candidate=True, sensitivity=True)
    assert [lane.name for lane in lanes] == ["reference", "candidate", *SITES, *map(probe_of, SITES)]
    assert [lane.name for lane in lanes if lane.probe] == list(map(probe_of, SITES))


def test_a_source_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match="asks for the candidate"):
        Pair(object(), None).pick(from_candidate=True)


def test_streams_go_in_step(sources: tuple[Source, Source]) -> None:
    with PairedStream(*sources, range(2), range(8), 2) as stream:
        for layer in range(2):
            dense = stream.dense(layer)
            assert dense.weights.reference and dense.weights.candidate
            assert dense.weights.reference.kv_scale is None and dense.weights.candidate.kv_scale is not None
            dense.release()
            for expert in range(8):
                stream.expert(layer, expert).release()
    with PairedStream(sources[0], None, range(1), range(8), 2) as stream:
        assert stream.dense(0).weights.candidate is None


def test_sequences_of_a_batch_do_not_see_each_other(sources: tuple[Source, Source]) -> None:
    arithmetic, pair = EngineArithmetic(sources[0].config, None), layer_of(sources)
    x_BTD = torch.randn(3, 9, 128, generator=torch.Generator().manual_seed(1))
    together, moe_x, routing = arithmetic.dense(pair, x_BTD, ignore)
    for row in range(3):
        alone, _, of_one = arithmetic.dense(pair, x_BTD[row : row + 1], ignore)
        assert torch.allclose(together[row], alone[0], atol=1e-5)
        assert routing.chosen_TK[9 * row : 9 * row + 9].equal(of_one.chosen_TK)
    assert moe_x.shape == (27, 128) and together.shape == x_BTD.shape


def test_a_cache_in_fp8_rounds_keys_and_values(sources: tuple[Source, Source]) -> None:
    pair, config = layer_of(sources), sources[0].config
    x_BTD = torch.randn(1, 9, 128, generator=torch.Generator().manual_seed(2))
    plain, rounded = (
        EngineArithmetic(config, sites).dense(pair, x_BTD, ignore)[0] for sites in (frozenset(), frozenset({"kv_cache"}))
    )
    error = float((plain - rounded).norm() / plain.norm())
    assert 1e-4 < error < 0.1
    assert not plain[0, 0].equal(rounded[0, 0]), "the first token's value is rounded, too"

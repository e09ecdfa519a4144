"""What calibration observes, and the scales made of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arctic_trt.errors import ArcticTrtError, CheckpointError
from arctic_trt.model.config import parse_config
from arctic_trt.model.layer import AttentionWeights, DenseWeights, MlpWeights, decoder_layer, gated_mlp, moe_input, route
from arctic_trt.quantize import token_pass
from arctic_trt.quantize.calibrate import Calibration
from arctic_trt.quantize.fp8 import amax
from arctic_trt.quantize.rows import FileRows, MemoryRows, Rows
from arctic_trt.quantize.scales import quantize_together, scale_activations, scale_kv_cache, weight_amax
from arctic_trt.quantize.stream import Unit, WorkPool
from arctic_trt.quantize.team import Solo
from arctic_trt.quantize.token_pass import SiteAmax, padded_rows
from tests.support.checkpoints import TINY, random_ids, random_tensors

CONFIG = parse_config({**TINY, "num_local_experts": 32})
TENSORS = random_tensors({**TINY, "num_local_experts": 32}, seed=5)


def dense(layer: int) -> DenseWeights:
    w = {name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): t for name, t in TENSORS.items()}
    return DenseWeights(
        w["input_layernorm"],
        w["post_attention_layernorm"],
        w["residual_layernorm"],
        AttentionWeights(*(w[f"self_attn.{p}_proj"] for p in "qkvo")),
        MlpWeights(*(w[f"residual_mlp.{m}"] for m in ("w1", "w2", "w3"))),
        w["block_sparse_moe.gate"],
    )


def experts(layer: int) -> list[MlpWeights]:
    prefix = f"model.layers.{layer}.block_sparse_moe.experts"
    return [MlpWeights(*(TENSORS[f"{prefix}.{e}.{m}.weight"] for m in ("w1", "w2", "w3"))) for e in range(32)]


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkPool]:
    pool = WorkPool(2)
    yield pool
    pool.close()


def calibrated(
    rows: list[list[int]], pool: WorkPool, layers: int = 2, spill_to: Path | None = None
) -> tuple[Calibration, list[dict[str, Tensor]], list[list[int]]]:
    """(calibration, amax by layer and site, tokens by layer and expert) after a pass over ``layers``."""

    def new_rows(tokens: int) -> Rows:
        return FileRows(tokens, CONFIG.hidden_size, spill_to) if spill_to else MemoryRows(tokens, CONFIG.hidden_size)

    calibration = Calibration([torch.tensor([row]) for row in rows], CONFIG, new_rows, Solo())
    calibration.embed(TENSORS["model.embed_tokens.weight"])
    found, tokens = [], []
    for layer in range(layers):
        calibration.enter(layer, Unit(dense(layer), lambda: None), pool)
        tokens.append([calibration.tokens_of(expert) for expert in range(32)])
        for expert, weights in enumerate(experts(layer)):
            for visit in calibration.visits(expert, Unit(weights, lambda: None)):
                calibration.add(visit())
        found.append(calibration.leave())
    return calibration, found, tokens


@pytest.mark.parametrize("spill", [False, True])
def test_hidden_states_advance_as_the_network_computes_them(spill: bool, pool: WorkPool, tmp_path: Path) -> None:
    [row] = random_ids(512, [9])
    calibration, _, _ = calibrated([row], pool, spill_to=tmp_path if spill else None)
    x = TENSORS["model.embed_tokens.weight"][torch.tensor([row])]
    with torch.inference_mode():
        for layer in (0, 1):
            x = decoder_layer(x, dense(layer), experts(layer), CONFIG)
    assert calibration.num_tokens == 9 and calibration.hidden.read(0, 9).equal(x[0])
    calibration.close()


def test_every_token_reaches_top_k_experts(pool: WorkPool) -> None:
    _, _, tokens = calibrated(random_ids(512, [9, 20, 3]), pool)
    assert [sum(layer) for layer in tokens] == [2 * 32] * 2


def test_an_amax_is_the_maximum_over_all_samples(pool: WorkPool) -> None:
    rows = random_ids(512, [9, 20, 3])
    _, together, _ = calibrated(rows, pool)
    apart = [calibrated([row], pool)[1] for row in rows]
    for layer in (0, 1):
        for site, value in together[layer].items():
            assert value == max(single[layer][site] for single in apart)


def test_the_tokens_of_an_expert_may_pass_it_in_parts(pool: WorkPool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_ids(512, [30, 20])
    whole, expected, _ = calibrated(rows, pool)
    monkeypatch.setattr(token_pass, "EXPERT_ROWS", 3)
    parts, found, _ = calibrated(rows, pool)
    assert found == expected and parts.hidden.read(0, 50).equal(whole.hidden.read(0, 50))


def test_a_unit_is_given_back_when_its_last_visit_has_run(pool: WorkPool) -> None:
    calibration, _, _ = calibrated(random_ids(512, [30, 20]), pool, layers=1)
    expert = max(range(32), key=calibration.tokens_of)
    given_back: list[int] = []
    unit = Unit(experts(0)[expert], lambda: given_back.append(expert))
    visits = calibration.visits(expert, unit)
    unit.release()
    assert visits and not given_back
    for visit in visits:
        visit()
    assert given_back == [expert]


def test_rows_are_padded_to_few_sizes_and_by_less_than_half() -> None:
    sizes = [padded_rows(count) for count in range(1, 4097)]
    assert all(count <= size < max(2 * count, count + 128, 9) for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 40 and sizes == sorted(sizes)


def test_experts_without_tokens_take_the_maximum_of_those_with_tokens_of_the_same_projection(pool: WorkPool) -> None:
    rows = random_ids(512, [9])
    _, [observed], [tokens] = calibrated(rows, pool, layers=1)
    assert tokens.count(0) >= 14
    x = moe_input(TENSORS["model.embed_tokens.weight"][torch.tensor(rows)], dense(0), CONFIG)
    routing = route(x, dense(0).gate, 2)
    inner: list[Tensor] = []
    for index, weights in enumerate(experts(0)):
        token, _ = routing.tokens_of(index)
        if len(token):
            gated_mlp(x[token], weights, lambda site, value: inner.append(amax(value)) if "proj" in site else None)
    assert len(inner) == 32 - tokens.count(0)
    assert observed["mlp.proj"] == max(inner) != observed["mlp.fc"] == amax(x)
    scales = scale_activations(observed, {"mlp.proj"})
    assert scales == {"mlp.proj.activation_scaling_factor": max(inner).float().reshape(1) / 448}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_activations_that_are_not_finite_name_site_and_layer(bad: float) -> None:
    with pytest.raises(ArcticTrtError, match=r"activations at mlp\.proj of layer 3 contain NaN or infinity"):
        SiteAmax(3).observe("mlp.proj", torch.tensor([1.0, bad]))


@pytest.mark.parametrize(("key", "value", "scale"), [(100, 448, 1.0), (449, 3, 449 / 448), (3, 3408, 3408 / 448), (0, 0, 1.0)])
def test_the_kv_scale_is_the_larger_of_both_and_at_least_one(key: float, value: float, scale: float) -> None:
    observed = {"attention.k_cache": torch.tensor(key), "attention.v_cache": torch.tensor(value)}
    assert scale_kv_cache(observed, 0) == {"attention.kv_cache_scaling_factor": torch.tensor([scale])}


@pytest.mark.parametrize(("key", "warned"), [(224.0, False), (230.0, True)])
def test_a_kv_cache_near_its_limit_is_warned_about(key: float, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    scale_kv_cache({"attention.k_cache": torch.tensor(key), "attention.v_cache": torch.tensor(1.0)}, 4)
    assert ("Layer 4: keys or values reach 230" in caplog.text) is warned


def test_matrices_that_share_a_scale_are_cast_with_the_larger_amax() -> None:
    found = quantize_together({"a": torch.tensor([1.0, -2.0]).bfloat16(), "b": torch.tensor([0.5]).bfloat16()})
    assert found.scale.equal(torch.tensor([2.0]) / 448)
    assert [codes.float().tolist() for codes in found.codes] == [[224.0, -448.0], [112.0]]


def test_weights_that_are_all_zero_get_scale_one_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    found = quantize_together({"w1": torch.zeros(4).bfloat16(), "w3": torch.zeros(4).bfloat16()})
    assert found.scale.tolist() == [1.0] and "w1 and w3: all weights are zero" in caplog.text


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float, fp8: bool) -> None:
    weights = {"w1": torch.ones(3).bfloat16(), "w3": torch.tensor([1.0, bad]).bfloat16()}
    with pytest.raises(CheckpointError, match="w3 contains NaN or infinity"):
        weight_amax(weights)
    with pytest.raises(CheckpointError, match="w3 contains NaN or infinity"):
        quantize_together(weights, fp8=fp8)


def test_what_stays_in_bf16_is_handed_through_without_a_scale(caplog: pytest.LogCaptureFixture) -> None:
    weights = {"w1": torch.zeros(4).bfloat16()}
    found = quantize_together(weights, fp8=False)
    assert found.scale is None and found.codes[0] is weights["w1"] and not caplog.records

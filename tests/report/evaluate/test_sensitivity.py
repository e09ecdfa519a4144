"""Which sites are found to cost most, and what is kept of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.checkpoint.trtllm import TrtCheckpoint
from arctic_trt.errors import UsageError
from arctic_trt.report.evaluate.lanes import SITES, probe_of
from arctic_trt.report.evaluate.sensitivity import (
    Unit,
    choose_units,
    extra_bytes,
    find_units,
    names_of,
    parse_budget,
    plan_recipe,
)

KL = {"attention": 0.4, "residual_mlp": 0.1, "experts": 0.2, "kv_cache": 0.05}
ERRORS = [
    {probe_of("attention"): 0.3, probe_of("residual_mlp"): 0.1, probe_of("experts"): 0.0, probe_of("kv_cache"): 0.1},
    {probe_of("attention"): 0.1, probe_of("residual_mlp"): 0.1, probe_of("experts"): 0.2, probe_of("kv_cache"): 0.1},
]
GROWS = {(layer, site): 10 * (layer + 1) for layer in range(2) for site in SITES[:3]}
UNITS = st.lists(
    st.builds(Unit, st.integers(0, 3), st.sampled_from(SITES[:3]), st.just(0.0), st.floats(0, 1), st.integers(0, 60)), max_size=7
)


def test_the_divergence_of_a_site_is_spread_by_squared_error() -> None:
    units = find_units(KL, ERRORS, GROWS)
    found = {(unit.layer, unit.site): unit for unit in units}
    assert found[0, "attention"].kl == pytest.approx(0.36) and found[1, "attention"].kl == pytest.approx(0.04)
    assert found[0, "experts"].kl == 0.0 and found[1, "experts"].kl == pytest.approx(0.2)
    assert found[None, "kv_cache"] == Unit(None, "kv_cache", pytest.approx(0.1), 0.05, 0)
    assert found[1, "residual_mlp"].bytes == 20 and found[1, "residual_mlp"].error == 0.1
    assert [unit.kl for unit in units] == sorted((unit.kl for unit in units), reverse=True)
    assert sum(unit.kl for unit in units) == pytest.approx(sum(KL.values()))


def test_what_is_not_quantized_is_no_choice() -> None:
    units = find_units(KL, ERRORS, {key: size for key, size in GROWS.items() if key != (0, "attention")})
    assert (0, "attention") not in {(unit.layer, unit.site) for unit in units}


@given(UNITS, st.integers(1, 150))
def test_the_choice_is_the_best_that_fits(units: list[Unit], budget: int) -> None:
    choice = choose_units(units, units, budget, 1.0)
    assert choice.spent_bytes <= budget
    best = max(
        sum(unit.kl for unit in some)
        for count in range(len(units) + 1)
        for some in itertools.combinations(units, count)
        if sum(unit.bytes for unit in some) <= budget
    )
    assert sum(unit.kl for unit in choice.kept) == pytest.approx(best)


@given(UNITS, st.integers(10**9, 10**12))
def test_large_sizes_never_exceed_the_budget(units: list[Unit], budget: int) -> None:
    large = [Unit(unit.layer, unit.site, 0.0, unit.kl, unit.bytes * budget // 80) for unit in units]
    assert choose_units(large, large, budget, 1.0).spent_bytes <= budget


def test_what_remains_is_what_is_expected() -> None:
    units = find_units(KL, ERRORS, GROWS)
    choice = choose_units(units, units, 10, 0.5)
    assert {(unit.layer, unit.site) for unit in choice.kept} == {(0, "attention"), (None, "kv_cache")}
    assert choice.predicted_kl == pytest.approx(0.5 * (1 - 0.41 / 0.75))
    kept = [item for item in choice.as_dict()["units"] if item["kept"]]
    assert {(item["layer"], item["site"]) for item in kept} == {(0, "attention"), (None, "kv_cache")}
    assert choose_units(units, [unit for unit in units if unit.site == "experts"], 100, 0.5).kept == [
        unit for unit in units if (unit.layer, unit.site) == (1, "experts")
    ], "a site that costs nothing is not kept, one that is not eligible neither"


def test_growth_is_what_other_formats_differ_by(checkpoints: Callable[..., Path]) -> None:
    for cut in ({"tp_size": 1}, {"tp_size": 4, "moe_ep_size": 2}):
        quantized, plain = TrtCheckpoint(checkpoints(**cut)), TrtCheckpoint(checkpoints(qformat="full_prec", **cut))
        payload = [
            sum(item.spec.num_bytes for rank in each.mapping.ranks() for item in each.file(rank.index).tensors.values())
            for each in (quantized, plain)
        ]
        ranks, layers = quantized.mapping.world_size, quantized.config.num_hidden_layers
        kv_scales = 4 * ranks * layers
        assert sum(extra_bytes(quantized).values()) == payload[1] - payload[0] + kv_scales
        assert extra_bytes(plain) == {}


def test_modules_are_named_as_tensorrt_names_them() -> None:
    assert names_of(Unit(3, "experts", 0, 0, 0)) == ["transformer.layers.3.mlp"]
    assert names_of(Unit(0, "residual_mlp", 0, 0, 0)) == [
        f"transformer.layers.0.residual_mlp.{name}" for name in ("fc", "gate", "proj")
    ]
    assert names_of(Unit(None, "kv_cache", 0, 0, 0)) == []


@pytest.mark.parametrize(("text", "size"), [("10%", 100), (" 2.5 % ", 25), ("300", 300), ("1kB", 1000)])
def test_budgets(text: str, size: int) -> None:
    assert parse_budget(text, 1000) == size


@pytest.mark.parametrize("text", ["0%", "-1%", "x%", "nan%", "much", "-5"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--size_budget"):
        parse_budget(text, 1000)


def test_the_recipe(checkpoints: Callable[..., Path]) -> None:
    checkpoint = TrtCheckpoint(checkpoints(tp_size=4, moe_ep_size=2))
    units = [Unit(1, "experts", 0, 0.3, 1), Unit(0, "attention", 0, 0.2, 1), Unit(None, "kv_cache", 0, 0.1, 0)]
    recorded = {"calib_size": 7, "calib_dataset": "mine.jsonl", "output_dir": "old", "exclude_modules": ["*.residual_mlp.*"]}
    recipe = plan_recipe(choose_units(units, units, 5, 1.0), checkpoint, Path("original"), recorded)
    assert recipe == {
        "model_dir": "original",
        "qformat": "fp8",
        "kv_cache_dtype": "none",
        "tp_size": 4,
        "pp_size": 1,
        "moe_tp_size": 2,
        "moe_ep_size": 2,
        "calib_dataset": "mine.jsonl",
        "calib_size": 7,
        "exclude_modules": [
            "*.residual_mlp.*",
            "transformer.layers.0.attention.dense",
            "transformer.layers.0.attention.qkv",
            "transformer.layers.1.mlp",
        ],
    }
    without_cache = plan_recipe(choose_units(units, units[:1], 5, 1.0), checkpoint, Path("original"), {})
    assert without_cache["kv_cache_dtype"] == "fp8" and without_cache["exclude_modules"] == ["transformer.layers.1.mlp"]

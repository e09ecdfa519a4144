"""Whole quantizations: what is written merges back to what was read, however it is cut, and always to the same bytes."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arctic_trt.checkpoint.tensors import bytes_of
from arctic_trt.quantize.memory import MemoryPlan
from arctic_trt.quantize.plan import plan_quantization
from arctic_trt.recipes import QuantizeRecipe
from tests.support.checkpoints import (
    TINY,
    UNLIKE_TINY,
    Config,
    random_checkpoint,
    random_ids,
    random_tensors,
    repeat_kv_heads,
    write_checkpoint,
    write_samples,
)
from tests.support.jobs import lasting, quantize, read_ranks
from tests.support.merged import merge_checkpoint
from tests.support.tokenizers import write_tokenizer

THREE_LAYERS = {**TINY, "num_hidden_layers": 3}
CUTS: dict[str, tuple[Config, dict[str, Any]]] = {
    "tp 1": (TINY, {"tp_size": 1}),
    "tp 8": (TINY, {"tp_size": 8}),
    "pp 2, uneven": (THREE_LAYERS, {"tp_size": 1, "pp_size": 2}),
    "pp 2 x tp 2": (THREE_LAYERS, {"tp_size": 2, "pp_size": 2}),
    "ep 2 of 4": (TINY, {"tp_size": 4, "moe_ep_size": 2}),
    "ep 4 of 4": (TINY, {"tp_size": 4, "moe_ep_size": 4}),
    "pp 3 x tp 4, ep 2": (THREE_LAYERS, {"tp_size": 4, "pp_size": 3, "moe_tp_size": 2}),
    "16 ranks of 8 kv heads": (TINY, {"tp_size": 16}),
    "7 query heads per kv head, vocabulary that does not divide": ({**UNLIKE_TINY, "vocab_size": 1001}, {"tp_size": 4}),
}
UNQUANTIZED = ("norm.weight", "layernorm.weight", "gate.weight", "embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def tiny_fp8(tiny_model: Path, tiny_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, cut for two ranks; nobody may change it."""
    path = tmp_path_factory.mktemp("fp8") / "out"
    quantize(tiny_model, path, tp_size=2, calib_dataset=str(tiny_samples))
    return path


def samples_for(config: Config, path: Path) -> str:
    return str(write_samples(path / "calib.jsonl", random_ids(config["vocab_size"], [16, 16, 9])))


def half_step(values: Tensor, scale: Tensor) -> Tensor:
    """Half the distance between the e4m3 numbers around ``values / scale``, times ``scale``, and float32 rounding."""
    binade = (values / scale).abs().clamp_min(2.0**-6).log2().floor()
    return 2.0 ** (binade - 4) * scale * (1 + 2**-17)


@pytest.mark.parametrize(("config", "flags"), CUTS.values(), ids=CUTS.keys())
def test_the_shards_merge_to_the_original_tensors(config: Config, flags: dict[str, Any], tmp_path: Path) -> None:
    tensors = random_tensors(config)
    model_dir = write_checkpoint(tmp_path / "model", config, tensors)
    quantize(model_dir, tmp_path / "out", calib_dataset=samples_for(config, tmp_path), **flags)
    merged, scales = merge_checkpoint(tmp_path / "out")
    assert merged.keys() == tensors.keys()
    for name, original in tensors.items():
        if name.endswith(UNQUANTIZED):
            assert name not in scales and merged[name].equal(original.float()), name
        else:
            assert ((merged[name] - original.float()).abs() <= half_step(original.float(), scales[name])).all(), name


@pytest.mark.parametrize(("config", "flags"), CUTS.values(), ids=CUTS.keys())
def test_full_precision_keeps_the_bf16_bytes(config: Config, flags: dict[str, Any], tmp_path: Path) -> None:
    tensors = random_tensors(config)
    model_dir = write_checkpoint(tmp_path / "model", config, tensors)
    report = quantize(model_dir, tmp_path / "out", qformat="full_prec", **flags)
    merged, scales = merge_checkpoint(tmp_path / "out")
    assert not scales and report["experts_without_tokens"] == [] and report["calibration_tokens"] == 0
    assert merged.keys() == tensors.keys() and all(merged[name].equal(tensors[name].float()) for name in tensors)
    for rank in read_ranks(tmp_path / "out"):
        assert {name for name, tensor in rank.items() if tensor.dtype != torch.bfloat16} == {n for n in rank if "router" in n}
        assert not any("scaling_factor" in name for name in rank)


def test_every_cut_has_the_same_codes_and_scales(tmp_path: Path) -> None:
    model_dir, samples = random_checkpoint(tmp_path / "model", THREE_LAYERS), samples_for(TINY, tmp_path)
    outputs = {}
    for name, flags in {name: flags for name, (_, flags) in CUTS.items() if "7 query" not in name}.items():
        quantize(model_dir, tmp_path / name, calib_dataset=samples, **flags)
        outputs[name] = merge_checkpoint(tmp_path / name)[0]
        scales = {
            n: t for rank in read_ranks(tmp_path / name)[:1] for n, t in rank.items() if "activation" in n or "kv_cache" in n
        }
        outputs[name] |= {f"{n} of the first layer": t for n, t in scales.items() if ".layers.0." in n}
    first = outputs.pop("tp 1")
    assert all(one.keys() == first.keys() and all(one[n].equal(first[n]) for n in first) for one in outputs.values())


def test_pipeline_stages_count_their_layers_from_zero(tmp_path: Path) -> None:
    model_dir = random_checkpoint(tmp_path / "model", THREE_LAYERS)
    quantize(model_dir, tmp_path / "out", qformat="full_prec", tp_size=2, pp_size=2)
    layers = [sorted({int(name.split(".")[2]) for name in rank if ".layers." in name}) for rank in read_ranks(tmp_path / "out")]
    assert layers == [[0, 1], [0, 1], [0], [0]]


def test_a_vocabulary_that_does_not_divide_ends_in_rows_of_zeros(tmp_path: Path) -> None:
    model_dir = random_checkpoint(tmp_path / "model", {**TINY, "vocab_size": 1001})
    quantize(model_dir, tmp_path / "out", qformat="full_prec", tp_size=4)
    ranks = read_ranks(tmp_path / "out")
    for name in ("lm_head.weight", "transformer.vocab_embedding.weight"):
        assert [len(rank[name]) for rank in ranks] == [251] * 4
        assert not ranks[3][name][-3:].any() and ranks[3][name][-4].any()
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 1001


def test_two_runs_write_the_same_bytes(tiny_model: Path, tiny_samples: Path, tmp_path: Path) -> None:
    reports = [quantize(tiny_model, tmp_path / run, tp_size=2, calib_dataset=str(tiny_samples)) for run in "ab"]
    assert lasting(tmp_path / "a") == lasting(tmp_path / "b")
    for report in reports:
        for key in ("seconds", "peak_rss_bytes", "output_dir", "recipe"):
            del report[key]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("spill", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("depth", [2, 4])
def test_threads_and_memory_change_no_byte(
    threads: int, spill: bool, depth: int, tiny_model: Path, tiny_samples: Path, tiny_fp8: Path, tmp_path: Path
) -> None:
    report = quantize(
        tiny_model,
        tmp_path / "out",
        tp_size=2,
        calib_dataset=str(tiny_samples),
        threads=threads,
        memory=MemoryPlan(depth, spill, 0, 1),
    )
    assert lasting(tmp_path / "out") == lasting(tiny_fp8)
    assert report["hidden_states_on_disk"] is spill


def test_a_budget_decides_whether_hidden_states_go_to_disk(tiny_model: Path, tmp_path: Path, tiny_fp8: Path) -> None:
    samples = write_samples(tmp_path / "calib.jsonl", random_ids(512, [1000] * 40))
    plan = plan_quantization(
        QuantizeRecipe(model_dir=tiny_model, output_dir=tmp_path / "out", tp_size=2, calib_dataset=str(samples))
    )
    assert not plan.memory.spill
    rows = 3 * 2 * 40 * 1000 // 2 * 128
    recipe = plan.recipe.model_copy(update={"memory_budget": str(plan.memory.peak_bytes - rows // 2)})
    assert plan_quantization(recipe).memory.spill


def test_shards_and_index_do_not_matter(tmp_path: Path, tiny_samples: Path) -> None:
    for shards in (1, 5):
        model_dir = random_checkpoint(tmp_path / f"model{shards}", TINY, shards=shards)
        quantize(model_dir, tmp_path / f"out{shards}", tp_size=2, calib_dataset=str(tiny_samples))
    assert lasting(tmp_path / "out1") == lasting(tmp_path / "out5")


def test_the_report_accounts_for_bytes_tokens_and_experts(tiny_model: Path, tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "calib.jsonl", random_ids(512, [30, 30, 8, 99]))
    report = quantize(
        tiny_model, tmp_path / "out", tp_size=2, calib_dataset=str(samples), calib_size=3, calib_max_seq_length=25, batch_size=2
    )
    assert report == json.loads((tmp_path / "out/report/quantize.json").read_text())
    assert (report["calibration_samples"], report["calibration_tokens"]) == (3, 58)
    assert [sum(layer) for layer in report["tokens_per_expert"]] == [2 * 58] * 2
    assert report["bytes_read"] == sum(tensor.nbytes for tensor in random_tensors(TINY).values())
    assert report["bytes_written"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("rank*"))
    assert report["recipe"]["calib_size"] == 3 and report["recipe"]["seed"] == 1234


def test_experts_without_tokens_are_listed(tmp_path: Path) -> None:
    config = {**TINY, "num_local_experts": 32}
    model_dir = random_checkpoint(tmp_path / "model", config)
    samples = write_samples(tmp_path / "calib.jsonl", random_ids(512, [9]))
    report = quantize(model_dir, tmp_path / "out", tp_size=1, calib_dataset=str(samples))
    unseen = [[layer, e] for layer, counts in enumerate(report["tokens_per_expert"]) for e, n in enumerate(counts) if n == 0]
    assert report["experts_without_tokens"] == unseen and len(unseen) >= 28
    [rank] = read_ranks(tmp_path / "out")
    tensors = random_tensors(config)
    for layer, expert in unseen:
        w2 = tensors[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"].float()
        scale = rank[f"transformer.layers.{layer}.mlp.proj.weights_scaling_factor"][expert]
        assert scale.equal((w2.abs().max() / 448).reshape(1)), "the weight's own scale needs no tokens"


def test_batches_change_nothing_but_the_forward_pass(tiny_model: Path, tiny_samples: Path, tmp_path: Path) -> None:
    outputs = []
    for batch_size in (1, 3):
        quantize(tiny_model, tmp_path / f"{batch_size}", tp_size=1, calib_dataset=str(tiny_samples), batch_size=batch_size)
        outputs.append(read_ranks(tmp_path / f"{batch_size}")[0])
    one, three = outputs
    for name, tensor in one.items():
        if name.endswith("activation_scaling_factor"):
            assert torch.allclose(tensor, three[name], rtol=0.05), name
        else:
            assert tensor.view(torch.uint8).equal(three[name].view(torch.uint8)), name


@pytest.mark.parametrize(
    ("heads", "kv_heads", "repeats", "stated"), [(16, 8, 2, 16), (16, 8, 2, 8), (14, 2, 7, 14), (14, 2, 7, 2)]
)
def test_repeated_kv_heads_give_the_bytes_of_the_unrepeated_checkpoint(
    tmp_path: Path, heads: int, kv_heads: int, repeats: int, stated: int
) -> None:
    config = {**TINY, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 8 * heads}
    tensors, samples = random_tensors(config), samples_for(config, tmp_path)
    write_checkpoint(tmp_path / "once", config, tensors)
    write_checkpoint(tmp_path / "often", {**config, "num_key_value_heads": stated}, repeat_kv_heads(tensors, 8, repeats))
    once = quantize(tmp_path / "once", tmp_path / "a", tp_size=2, calib_dataset=samples)
    often = quantize(tmp_path / "often", tmp_path / "b", tp_size=2, calib_dataset=samples)
    assert lasting(tmp_path / "a") == lasting(tmp_path / "b")
    assert (once["kv_heads_folded_from"], often["kv_heads_folded_from"]) == (None, heads)


def test_the_tokenizer_travels_along(tmp_path: Path) -> None:
    model_dir = write_tokenizer(random_checkpoint(tmp_path / "model"))
    (model_dir / "generation_config.json").write_text('{"eos_token_id": 2}')
    samples = write_samples(tmp_path / "calib.jsonl", [{"text": "the future"}])
    report = quantize(model_dir, tmp_path / "out", tp_size=1, calib_dataset=str(samples))
    assert report["calibration_tokens"] == 3
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model_dir / name).read_bytes()


def test_the_report_has_every_scale_and_the_configuration(tiny_fp8: Path) -> None:
    report = json.loads((tiny_fp8 / "report/quantize.json").read_text())
    assert report["config"] == json.loads((tiny_fp8 / "config.json").read_text())
    ranks = read_ranks(tiny_fp8)
    for layer, (single, experts) in enumerate(zip(report["scales"], report["expert_scales"], strict=True)):
        prefix = f"transformer.layers.{layer}."
        stored = {name.removeprefix(prefix): t for name, t in ranks[0].items() if name.startswith(prefix) and "factor" in name}
        per_expert = {f"{name}.weights_scaling_factor": values for name, values in experts.items()}
        assert stored.keys() == single.keys() | per_expert.keys() and experts.keys() == {"mlp.fc", "mlp.proj"}
        assert all(stored[name].item() == value for name, value in single.items())
        assert all(stored[name].flatten().tolist() == values for name, values in per_expert.items())


def test_digests_are_those_of_the_bytes_on_disk(tiny_fp8: Path) -> None:
    record = json.loads((tiny_fp8 / "report/digests.json").read_text())
    found = {
        f"rank{rank}.safetensors": {name: f"{zlib.crc32(bytes_of(tensor)):08x}" for name, tensor in tensors.items()}
        for rank, tensors in enumerate(read_ranks(tiny_fp8))
    }
    assert record == {"files": {}, "tensors": found}


def test_side_files_have_digests_too(tiny_model: Path, tiny_samples: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "tokenizer_config.json").write_bytes(b"123456789")
    quantize(model, tmp_path / "out", calib_dataset=str(tiny_samples))
    assert json.loads((tmp_path / "out/report/digests.json").read_text())["files"] == {"tokenizer_config.json": "cbf43926"}

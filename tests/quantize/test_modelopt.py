"""What NVIDIA ModelOpt computes, over models that are unlike each other: weights and their scales bit for bit.

So are all scales of the tiny model. Of wider ones an activation's scale may be off by one step of bf16: an expert sees the tokens
of all batches in one matrix product here and batch by batch there, and some machines' kernels sum in another order for another
number of rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from arctic_trt.checkpoint.journal import Journal
from arctic_trt.errors import RefusedError
from arctic_trt.quantize.data import plan_batches
from tests.support.checkpoints import (
    TINY,
    UNLIKE_TINY,
    Config,
    Tensors,
    random_ids,
    random_tensors,
    write_checkpoint,
    write_samples,
)
from tests.support.jobs import lasting, quantize, read_ranks
from tests.support.merged import merge_checkpoint

pytest.importorskip("modelopt")
from tests.support.modelopt_reference import ModelOptReference

BF16_STEP = 2.0**-7
pytestmark = [pytest.mark.modelopt, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def with_loud_keys(tensors: Tensors) -> Tensors:
    """Keys that reach thousands, so that the KV cache needs a scale above 1."""
    return {name: tensor * 512 if name.endswith("k_proj.weight") else tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Model:
    config: Config
    lengths: list[int]
    batch_size: int = 1
    change: Callable[[Tensors], Tensors] = dict

    def tensors(self) -> Tensors:
        return self.change(random_tensors(self.config, seed=11))

    def samples(self) -> list[list[int]]:
        return random_ids(self.config["vocab_size"], self.lengths)


MODELS = {
    "tiny": Model(TINY, [32, 32, 32, 21, 21, 5]),
    "tiny in batches": Model(TINY, [32, 32, 32, 21, 21, 5], batch_size=2),
    "unlike tiny": Model(UNLIKE_TINY, [40, 40, 13], batch_size=2),
    "few tokens for 32 experts": Model({**TINY, "num_local_experts": 32}, [9]),
    "more ranks than KV heads": Model({**TINY, "num_local_experts": 16}, [32, 7]),
    "mid-size, some of 64 experts unrouted": Model(
        {**TINY, "hidden_size": 256, "intermediate_size": 128, "num_local_experts": 64, "num_hidden_layers": 3},
        [24, 24, 24, 9],
        batch_size=2,
    ),
    "loud keys": Model(TINY, [32, 32], change=with_loud_keys),
    "top-1, a KV head for every query head": Model({**TINY, "num_key_value_heads": 16, "num_experts_per_tok": 1}, [32, 7]),
}
CASES = [
    ("tiny", 1),
    ("tiny", 2),
    ("tiny", 8),
    ("more ranks than KV heads", 16),
    ("tiny in batches", 2),
    ("unlike tiny", 4),
    ("few tokens for 32 experts", 1),
    ("mid-size, some of 64 experts unrouted", 2),
    ("loud keys", 2),
    ("top-1, a KV head for every query head", 2),
]


@pytest.fixture(scope="module")
def reference() -> Callable[[str], ModelOptReference]:
    """The calibrated reference of a model, made when first asked for."""
    made: dict[str, ModelOptReference] = {}

    def get(name: str) -> ModelOptReference:
        if name not in made:
            model = MODELS[name]
            made[name] = ModelOptReference(model.config, model.tensors(), plan_batches(model.samples(), model.batch_size))
        return made[name]

    return get


def write_inputs(name: str, path: Path) -> dict[str, Any]:
    """The model and its samples on disk, as the recipe of a quantization."""
    model = MODELS[name]
    model_dir = write_checkpoint(path / "model", model.config, model.tensors())
    samples = write_samples(path / "calib.jsonl", model.samples())
    return {"model_dir": model_dir, "calib_dataset": str(samples), "batch_size": model.batch_size}


def is_activation(name: str) -> bool:
    return name.endswith(("activation_scaling_factor", "kv_cache_scaling_factor"))


def differing(found: list[Tensors], expected: list[Tensors], *, exact: bool = False) -> list[str]:
    """Names of the tensors that are not the same; activation scales are, unless ``exact``, while within one step of bf16."""
    names = []
    for rank, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (mine[name].dtype, mine[name].shape) == (tensor.dtype, tensor.shape), name
            if is_activation(name) and not exact:
                same = torch.allclose(mine[name], tensor, rtol=BF16_STEP, atol=0)
            else:
                same = mine[name].view(torch.uint8).equal(tensor.view(torch.uint8))
            if not same:
                names.append(f"rank {rank} {name}")
    return names


@pytest.mark.parametrize(("name", "tp_size"), CASES)
def test_every_tensor_of_every_rank_is_the_same(
    name: str, tp_size: int, reference: Callable[[str], ModelOptReference], tmp_path: Path
) -> None:
    report = quantize(output_dir=tmp_path / "out", tp_size=tp_size, **write_inputs(name, tmp_path))
    found, expected = read_ranks(tmp_path / "out"), reference(name).export(tmp_path / "modelopt", tp_size)
    assert len(found) == tp_size and not differing(found, expected, exact=name.startswith("tiny"))
    if name == "loud keys":
        assert all(found[0][f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"] > 2 for layer in (0, 1))
    if "64 experts" in name:
        assert report["experts_without_tokens"]


@pytest.mark.parametrize(
    "flags", [{"tp_size": 4, "moe_ep_size": 2}, {"tp_size": 4, "moe_ep_size": 4}, {"tp_size": 2, "pp_size": 3}], ids=str
)
def test_other_cuts_hold_the_same_codes_and_scales(
    flags: dict[str, int], reference: Callable[[str], ModelOptReference], tmp_path: Path
) -> None:
    """ModelOpt exports tensor parallelism alone; merged, every cut is the same checkpoint."""
    name = "mid-size, some of 64 experts unrouted"
    quantize(output_dir=tmp_path / "out", **flags, **write_inputs(name, tmp_path))
    reference(name).export(tmp_path / "modelopt", 1)
    quantize(output_dir=tmp_path / "whole", tp_size=1, model_dir=tmp_path / "model", calib_dataset=str(tmp_path / "calib.jsonl"))
    merged, scales = merge_checkpoint(tmp_path / "out")
    whole, whole_scales = merge_checkpoint(tmp_path / "whole")
    [theirs] = [load_file(tmp_path / "modelopt" / "rank0.safetensors")]
    [ours] = read_ranks(tmp_path / "whole")
    assert not differing([ours], [{name: theirs[name] for name in ours}])
    assert merged.keys() == whole.keys() and all(merged[name].equal(whole[name]) for name in whole)
    assert scales.keys() == whole_scales.keys() and all(scales[name].equal(whole_scales[name]) for name in scales)


@pytest.mark.parametrize("name", ["tiny in batches", "mid-size, some of 64 experts unrouted", "loud keys"])
def test_modelopt_itself_writes_the_same_checkpoint(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"tp_size": 2, **write_inputs(name, tmp_path)}
    quantize(output_dir=tmp_path / "streaming", **recipe)
    report = quantize(output_dir=tmp_path / "modelopt", calibrator="modelopt", **recipe)
    assert not differing(read_ranks(tmp_path / "modelopt"), read_ranks(tmp_path / "streaming"))
    assert (tmp_path / "modelopt/config.json").read_bytes() == (tmp_path / "streaming/config.json").read_bytes()
    assert capsys.readouterr().out == "", "stdout is for results"
    assert report["recipe"]["calibrator"] == "modelopt" and report["tokens_per_expert"] == [[]] * len(report["tokens_per_expert"])


def test_modelopts_other_algorithm_gives_other_scales(tmp_path: Path) -> None:
    recipe = {"tp_size": 1, **write_inputs("tiny", tmp_path)}
    quantize(output_dir=tmp_path / "max", calibrator="modelopt", **recipe)
    quantize(output_dir=tmp_path / "mse", calibrator="modelopt", calib_algorithm="mse", **recipe)
    [one], [other] = read_ranks(tmp_path / "max"), read_ranks(tmp_path / "mse")
    scales = [name for name in one if name.endswith("weights_scaling_factor")]
    assert any(not one[name].equal(other[name]) for name in scales) and all((other[name] > 0).all() for name in scales)
    merged, scale_of = merge_checkpoint(tmp_path / "mse")
    for weight, original in random_tensors(TINY, seed=11).items():
        if weight in scale_of:
            clipped = original.float().clamp(-448 * scale_of[weight], 448 * scale_of[weight])
            assert (merged[weight] - clipped).abs().max() <= 16 * scale_of[weight].max(), "codes belong to their scales"


def test_modelopts_result_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"tp_size": 2, "calibrator": "modelopt", **write_inputs("tiny", tmp_path)}
    quantize(output_dir=tmp_path / "whole", **recipe)
    commit = Journal.commit

    def commit_once(journal: Journal, layer: int, record: Any) -> None:
        if layer:
            raise KeyboardInterrupt
        commit(journal, layer, record)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "commit", commit_once)
        quantize(output_dir=tmp_path / "out", **recipe)
    with pytest.raises(RefusedError, match="differs in calibrator"):
        quantize(output_dir=tmp_path / "out", **{**recipe, "calibrator": "streaming"})
    assert quantize(output_dir=tmp_path / "out", **recipe)["resumed_layers"] == 1
    assert lasting(tmp_path / "out") == lasting(tmp_path / "whole")


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    with pytest.raises(RefusedError, match=r"--calibrator modelopt needs nvidia-modelopt\. pip install 'arctic-trt\[modelopt\]'"):
        quantize(output_dir=tmp_path / "out", calibrator="modelopt", tp_size=1, **write_inputs("tiny", tmp_path))
    assert not (tmp_path / "out").exists()

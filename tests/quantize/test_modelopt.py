"""Bit for bit what NVIDIA ModelOpt computes: every tensor of every rank, over models that are unlike each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

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
from tests.support.jobs import quantize, read_ranks

pytest.importorskip("modelopt")
from tests.support.modelopt_reference import ModelOptReference

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


def ours(name: str, tp_size: int, path: Path) -> list[Tensors]:
    model = MODELS[name]
    model_dir = write_checkpoint(path / "model", model.config, model.tensors())
    samples = write_samples(path / "calib.jsonl", model.samples())
    quantize(model_dir, path / "out", tp_size=tp_size, calib_dataset=str(samples), batch_size=model.batch_size)
    return read_ranks(path / "out")


@pytest.mark.parametrize(("name", "tp_size"), CASES)
def test_every_tensor_of_every_rank_is_bit_identical(
    name: str, tp_size: int, reference: Callable[[str], ModelOptReference], tmp_path: Path
) -> None:
    expected, found = reference(name).export(tmp_path / "modelopt", tp_size), ours(name, tp_size, tmp_path)
    assert len(found) == tp_size
    differing = []
    for rank in range(tp_size):
        assert found[rank].keys() == expected[rank].keys()
        for tensor_name, tensor in expected[rank].items():
            mine = found[rank][tensor_name]
            assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape), tensor_name
            if not mine.view(torch.uint8).equal(tensor.view(torch.uint8)):
                differing.append(f"rank {rank} {tensor_name}")
    assert not differing
    if name == "loud keys":
        assert all(found[0][f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"] > 2 for layer in (0, 1))

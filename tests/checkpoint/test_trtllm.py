"""Opening a finished TensorRT-LLM checkpoint: whatever is not what config.json promises is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arctic_trt.checkpoint.trtllm import TrtCheckpoint
from arctic_trt.errors import ArcticTrtError, CheckpointError, UsageError
from tests.support.jobs import quantize, read_ranks


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_samples: Path) -> Path:
    path = tmp_path_factory.mktemp("trtllm") / "out"
    quantize(tiny_model, path, tp_size=2, calib_dataset=str(tiny_samples))
    return path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_every_tensor_of_every_rank_can_be_read(finished: Path) -> None:
    checkpoint = TrtCheckpoint(finished)
    for rank, expected in enumerate(read_ranks(finished)):
        assert set(checkpoint.names(rank)) == set(expected)
        for name, tensor in expected.items():
            assert checkpoint.read(rank, name).view(torch.uint8).equal(tensor.view(torch.uint8))
    checkpoint.close()


def edit_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        raw = json.loads((path / "config.json").read_text())
        change(raw)
        (path / "config.json").write_text(json.dumps(raw))

    return edit


def edit_rank1(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = load_file(path / "rank1.safetensors")
        change(tensors)
        save_file(tensors, path / "rank1.safetensors")

    return edit


@pytest.mark.parametrize(
    ("spoil", "error", "complaint"),
    [
        (lambda path: (path / "config.json").unlink(), UsageError, "config.json does not exist"),
        (lambda path: (path / "config.json").write_text("{"), UsageError, "config.json is not valid JSON"),
        (lambda path: (path / "config.json").write_text("[]"), UsageError, "holds a list"),
        (edit_config(lambda raw: raw.pop("moe")), UsageError, "lacks the key 'moe'"),
        (edit_config(lambda raw: raw["mapping"].pop("tp_size")), UsageError, "lacks the key 'tp_size'"),
        (edit_config(lambda raw: raw.update(architecture="LlamaForCausalLM")), UsageError, "'LlamaForCausalLM'"),
        (edit_config(lambda raw: raw.update(residual_mlp=False)), UsageError, "with residual_mlp"),
        (edit_config(lambda raw: raw.update(hidden_size="128")), UsageError, "hidden_size"),
        (edit_config(lambda raw: raw["quantization"].update(quant_algo="INT8")), UsageError, "INT8"),
        (edit_config(lambda raw: raw["mapping"].update(tp_size=3, moe_tp_size=3)), UsageError, "does not divide"),
        (edit_config(lambda raw: raw["mapping"].update(tp_size=4, moe_tp_size=4)), CheckpointError, "expected BF16 [128, 128]"),
        (lambda path: (path / "rank1.safetensors").unlink(), CheckpointError, "rank1.safetensors does not exist"),
        (edit_rank1(lambda t: t.pop("lm_head.weight")), CheckpointError, "rank1.safetensors lacks tensor lm_head.weight"),
        (edit_rank1(lambda t: t.update(x=torch.zeros(1))), CheckpointError, "holds the unexpected tensor x"),
        (
            edit_rank1(lambda t: t.update({"transformer.ln_f.weight": torch.zeros(64).bfloat16()})),
            CheckpointError,
            "transformer.ln_f.weight in",
        ),
        (
            edit_rank1(lambda t: t.update({"transformer.ln_f.weight": torch.zeros(128)})),
            CheckpointError,
            "is F32 [128], expected BF16 [128]",
        ),
    ],
)
def test_a_spoiled_checkpoint_is_refused_by_name(
    copy: Path, spoil: Callable[[Path], object], error: type[ArcticTrtError], complaint: str
) -> None:
    spoil(copy)
    with pytest.raises(error) as caught:
        TrtCheckpoint(copy)
    assert complaint in str(caught.value) and str(copy) in str(caught.value)

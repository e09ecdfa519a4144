"""Layers as they are read from a model, and from the ranks of a checkpoint of any cut."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.errors import UsageError
from arctic_trt.report.evaluate.sources import (
    CheckpointSource,
    DenseProjections,
    ExpertProjections,
    ModelSource,
    Source,
    open_source,
)
from arctic_trt.runtime.kernels import Projection
from tests.report.evaluate.conftest import EVALUATED
from tests.support.checkpoints import SMALL, random_tensors, repeat_kv_heads, write_checkpoint
from tests.support.engines import build_engine
from tests.support.fp8_emulation import merge_with_scales
from tests.support.merged import merge_checkpoint

CUTS = [{"tp_size": 1}, {"tp_size": 2, "moe_ep_size": 2}, {"tp_size": 8}, {"tp_size": 4, "moe_ep_size": 2, "pp_size": 2}]
Opened = Callable[[Path], Source]


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Sources that are closed after the test."""
    sources: list[Source] = []

    def keep(path: Path) -> Source:
        sources.append(open_source(path))
        return sources[-1]

    yield keep
    for source in sources:
        source.close()


def read_dense(source: Source, layer: int) -> DenseProjections:
    return source.dense(layer, torch.empty(source.buffer_bytes(layer, None), dtype=torch.uint8))


def read_expert(source: Source, layer: int, expert: int) -> ExpertProjections:
    return source.expert(layer, expert, torch.empty(source.buffer_bytes(layer, expert), dtype=torch.uint8))


def matrices(source: Source, layer: int, expert: int) -> dict[str, Projection]:
    dense, one = read_dense(source, layer), read_expert(source, layer, expert)
    named = {name: getattr(dense, name) for name in ("qkv", "dense", "residual_fc", "residual_proj")}
    return {**named, "fc": one.fc, "proj": one.proj}


def expected(values: dict[str, Tensor], layer: int, expert: int) -> dict[str, Tensor]:
    """The matrices by Hugging Face names, joined as :class:`DenseProjections` and :class:`ExpertProjections` say."""
    at, mlp = f"model.layers.{layer}.", f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
    return {
        "qkv": torch.cat([values[f"{at}self_attn.{p}_proj.weight"] for p in "qkv"]),
        "dense": values[f"{at}self_attn.o_proj.weight"],
        "residual_fc": torch.cat([values[f"{at}residual_mlp.{w}.weight"] for w in ("w1", "w3")]),
        "residual_proj": values[f"{at}residual_mlp.w2.weight"],
        "fc": torch.cat([values[f"{mlp}{w}.weight"] for w in ("w1", "w3")]),
        "proj": values[f"{mlp}w2.weight"],
    }


def test_a_model_is_read_as_it_is(model: Path, opened: Opened) -> None:
    tensors, source = random_tensors(EVALUATED, seed=3), opened(model)
    assert isinstance(source, ModelSource)
    for name, projection in matrices(source, 1, 5).items():
        assert projection.weight.equal(expected(tensors, 1, 5)[name]), name
        assert projection.input_scale is None and projection.alpha is None
    dense = read_dense(source, 1)
    assert dense.small.router.equal(tensors["model.layers.1.block_sparse_moe.gate.weight"].float())
    assert dense.small.post_norm.equal(tensors["model.layers.1.post_attention_layernorm.weight"].float())
    assert dense.kv_scale is None
    ends = source.ends()
    assert ends.lm_head.equal(tensors["lm_head.weight"]) and ends.embedding.equal(tensors["model.embed_tokens.weight"])
    assert ends.final_norm.equal(tensors["model.norm.weight"].float())


def test_repeated_kv_heads_are_folded(tmp_path: Path, opened: Opened) -> None:
    tensors = random_tensors(SMALL)
    plain = opened(write_checkpoint(tmp_path / "plain", SMALL, tensors))
    repeated = opened(write_checkpoint(tmp_path / "repeated", SMALL, repeat_kv_heads(tensors, 8, 2)))
    assert read_dense(repeated, 1).qkv.weight.equal(read_dense(plain, 1).qkv.weight)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_checkpoint_that_is_not_quantized_is_the_model(
    checkpoints: Callable[..., Path], model: Path, cut: dict[str, int], opened: Opened
) -> None:
    mine, original = opened(checkpoints(qformat="full_prec", **cut)), opened(model)
    assert isinstance(mine, CheckpointSource)
    for layer, expert in ((0, 0), (1, 7)):
        theirs = matrices(original, layer, expert)
        for name, projection in matrices(mine, layer, expert).items():
            assert projection.weight.equal(theirs[name].weight) and projection.alpha is None, name
        small, wanted = read_dense(mine, layer).small, read_dense(original, layer).small
        assert all(
            getattr(small, name).equal(getattr(wanted, name)) for name in ("input_norm", "post_norm", "residual_norm", "router")
        )
    for name in ("embedding", "final_norm", "lm_head"):
        assert getattr(mine.ends(), name).equal(getattr(original.ends(), name))


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_codes_and_scales_are_those_of_the_checkpoint(
    checkpoints: Callable[..., Path], cut: dict[str, int], opened: Opened
) -> None:
    directory = checkpoints(**cut)
    source, (values, scales) = opened(directory), merge_checkpoint(directory)
    numbers = merge_with_scales(directory, source.checkpoint.raw_config)  # type: ignore[attr-defined]
    names = {"qkv": "self_attn.q_proj", "dense": "self_attn.o_proj", "residual_fc": "residual_mlp.w1"}
    names |= {"residual_proj": "residual_mlp.w2", "fc": "block_sparse_moe.experts.6.w1", "proj": "block_sparse_moe.experts.6.w2"}
    inputs = {
        "qkv": "q",
        "dense": "o",
        "residual_fc": "residual.w1",
        "residual_proj": "residual.w2",
        "fc": "6.w1",
        "proj": "6.w2",
    }
    for name, projection in matrices(source, 1, 6).items():
        scale = scales[f"model.layers.1.{names[name]}.weight"]
        assert (projection.weight.float() * scale).equal(expected(values, 1, 6)[name]), name
        assert projection.input_scale is not None and projection.alpha is not None
        activation = numbers[f"1.{inputs[name]}.a"]
        assert projection.input_scale.equal(activation) and projection.alpha.equal(scale.view(1) * activation), name
    assert read_dense(source, 1).kv_scale is not None


def test_bytes_are_counted(checkpoints: Callable[..., Path], model: Path, opened: Opened) -> None:
    source, original = opened(checkpoints(tp_size=1)), opened(model)
    for each in (source, original):
        for layer in range(2):
            read_dense(each, layer)
            for expert in range(8):
                read_expert(each, layer, expert)
        each.ends()
    files = sum(path.stat().st_size for path in source.files)
    assert 0.95 * files < source.bytes_read <= 1.01 * files
    assert original.bytes_read >= HfCheckpoint(model).total_bytes


def test_an_engine_is_refused(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    engine = build_engine(checkpoints(tp_size=1), tmp_path / "engine")
    with pytest.raises(UsageError, match=r"is an engine.*the checkpoint that it was built from"):
        open_source(engine)


def test_no_configuration(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / "config.json").unlink()
    with pytest.raises(UsageError, match=r"config\.json"):
        open_source(copy)

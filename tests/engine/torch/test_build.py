"""Engines of the torch backend: what is in them, that they need nothing else, and that they appear whole or not at all."""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from arctic_trt.checkpoint.digests import DIGESTS, crc_text, read_digests
from arctic_trt.checkpoint.tensors import bytes_of
from arctic_trt.checkpoint.trtllm import TrtCheckpoint
from arctic_trt.engine.config import plan_build_config
from arctic_trt.engine.torch import build
from arctic_trt.engine.torch.build import RankBuilt, build_torch_engine, plan_torch_build
from arctic_trt.engine.torch.format import plan_engine_rank
from arctic_trt.errors import ArcticTrtError, CheckpointError, RefusedError
from tests.support.jobs import quantize, read_ranks, tree
from tests.support.small_tokenizer import write_tokenizer

LAYOUTS = {
    "tp1": {"tp_size": 1},
    "tp8": {"tp_size": 8},
    "tp4ep2": {"tp_size": 4, "moe_ep_size": 2},
    "tp2pp2": {"tp_size": 2, "pp_size": 2},
    "bf16": {"tp_size": 2, "qformat": "full_prec"},
    "kv_float": {"tp_size": 1, "kv_cache_dtype": "none"},
    "mixed": {"tp_size": 2, "exclude_modules": ("transformer.layers.0.mlp", "*.[1].residual_mlp.*", "*.attention.qkv")},
}


@pytest.fixture(scope="module")
def checkpoints(tiny_model: Path, tiny_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("checkpoints")
    for name, recipe in LAYOUTS.items():
        quantize(tiny_model, directory / name, calib_dataset=str(tiny_samples), **recipe)
        write_tokenizer(directory / name)
    return {name: directory / name for name in LAYOUTS}


def make(checkpoint_dir: Path, engine_dir: Path, *, workers: int = 1, overwrite: bool = False) -> list[RankBuilt]:
    checkpoint = TrtCheckpoint(checkpoint_dir)
    plan = plan_torch_build(checkpoint, engine_dir, plan_build_config(checkpoint.config), overwrite=overwrite)
    return build_torch_engine(plan, workers=workers)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and found.view(-1).view(torch.uint8).equal(
        expected.contiguous().view(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_is_what_the_format_says(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    make(checkpoints[name], tmp_path / "engine")
    checkpoint = TrtCheckpoint(checkpoints[name])
    sources, engines = read_ranks(checkpoints[name]), read_ranks(tmp_path / "engine")
    for rank, source, engine in zip(checkpoint.mapping.ranks(), sources, engines, strict=True):
        planned = plan_engine_rank(checkpoint.config, rank, checkpoint.quant)
        assert {spec.name: spec.shape for spec in planned} == {key: tuple(value.shape) for key, value in engine.items()}
        for key, tensor in engine.items():
            if key.startswith("layers."):
                assert same_bits(tensor, expected_tensor(source, key)), key
    assert engines[0]["embedding"].equal(sources[0]["transformer.vocab_embedding.weight"])
    assert engines[-1]["lm_head"].equal(sources[-1]["lm_head.weight"])
    assert engines[-1]["final_norm"].equal(sources[-1]["transformer.ln_f.weight"])


def expected_tensor(source: dict[str, Tensor], key: str) -> Tensor:
    """One layer tensor of an engine, made from the checkpoint's by the words of the format."""
    _, layer, name, *kind = key.split(".")
    at = f"transformer.layers.{layer}."
    single = {
        "input_norm": "input_layernorm.weight",
        "post_norm": "post_layernorm.weight",
        "residual_norm": "residual_layernorm.weight",
        "router": "mlp.router.weight",
        "kv_scale": "attention.kv_cache_scaling_factor",
    }
    if name in single:
        return source[at + single[name]]
    if name == "kv_scale_inverse":
        return 1 / source[f"{at}attention.kv_cache_scaling_factor"]
    trt = {
        "qkv": "attention.qkv",
        "dense": "attention.dense",
        "expert_fc": "mlp.fc",
        "expert_proj": "mlp.proj",
        "residual_fc": "residual_mlp.fc",
        "residual_proj": "residual_mlp.proj",
    }[name]
    if kind == ["weight"]:
        if name != "residual_fc":
            return source[f"{at}{trt}.weight"]
        halves = [source[f"{at}residual_mlp.{half}.weight"].view(torch.uint8) for half in ("fc", "gate")]
        return torch.cat(halves).view(source[f"{at}{trt}.weight"].dtype)
    activation = source[f"{at}{trt}.activation_scaling_factor"]
    return activation if kind == ["input_scale"] else source[f"{at}{trt}.weights_scaling_factor"] * activation


def test_workers_change_nothing_but_the_time(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    calls: list[int] = []
    for workers in (1, 3, 50):
        checkpoint = TrtCheckpoint(checkpoints["tp8"])
        plan = plan_torch_build(checkpoint, tmp_path / str(workers), plan_build_config(checkpoint.config))
        built = build_torch_engine(plan, workers=workers, on_rank=lambda rank: calls.append(rank.rank))
        assert [rank.rank for rank in built] == list(range(8))
        assert sum(rank.num_bytes for rank in built) == plan.output_bytes
    assert tree(tmp_path / "1") == tree(tmp_path / "3") == tree(tmp_path / "50")
    assert sorted(calls) == sorted([*range(8)] * 3)


def test_the_directory_is_complete(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    make(checkpoints["tp2pp2"], tmp_path / "engine")
    assert {path.name for path in (tmp_path / "engine").iterdir()} == {
        "config.json",
        *(f"rank{rank}.safetensors" for rank in range(4)),
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "report",
    }
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert config["pretrained_config"] == json.loads((checkpoints["tp2pp2"] / "config.json").read_text())
    assert config["backend"] == "torch"


def test_a_checkpoint_without_a_tokenizer_will_do(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["tp1"], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "generation*"))
    make(tmp_path / "bare", tmp_path / "engine")
    assert {path.name for path in (tmp_path / "engine").iterdir()} == {"config.json", "rank0.safetensors", "report"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_digests_are_those_of_the_bytes_on_disk(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    make(checkpoints[name], tmp_path / "engine", workers=2)
    record = read_digests(tmp_path / "engine")
    assert record and record.tensors == {
        f"rank{rank}.safetensors": {name: crc_text(zlib.crc32(bytes_of(tensor))) for name, tensor in tensors.items()}
        for rank, tensors in enumerate(read_ranks(tmp_path / "engine"))
    }
    assert record.files.keys() == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        ("transformer.layers.0.mlp.proj.weight", r"mlp\.proj\.weight of .*rank1.safetensors is not what was written there"),
        ("transformer.layers.1.residual_mlp.gate.weight", r"fc\.weight and .*gate\.weight of .*rank1.safetensors are not"),
        ("transformer.layers.1.attention.qkv.activation_scaling_factor", r"qkv\.activation_scaling_factor of .* is not"),
    ],
)
def test_a_checkpoint_that_is_not_what_quantize_wrote_is_refused(
    tensor: str, sentence: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(checkpoints["tp8"], tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "rank1.safetensors"
    tensors = load_file(path)
    tensors[tensor].view(-1).view(torch.uint8)[0] ^= 1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=sentence):
        make(tmp_path / "checkpoint", tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
    (tmp_path / "checkpoint" / DIGESTS).unlink()
    make(tmp_path / "checkpoint", tmp_path / "engine")


def test_a_record_that_cannot_be_read_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["tp1"], tmp_path / "checkpoint")
    for text in ("{", "[]", '{"files": {}}', '{"files": {}, "tensors": {"rank0.safetensors": {"a": "0x12"}}}'):
        (tmp_path / "checkpoint" / DIGESTS).write_text(text)
        with pytest.raises(CheckpointError, match=r"report/digests.json cannot be read"):
            make(tmp_path / "checkpoint", tmp_path / "engine")


@pytest.mark.parametrize("scale", ["weights_scaling_factor", "activation_scaling_factor"])
def test_scales_that_cannot_be_joined_are_not_joined(scale: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["tp1"], tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "rank0.safetensors"
    tensors = load_file(path)
    tensors[f"transformer.layers.1.residual_mlp.gate.{scale}"] *= 2
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"layers\.1\.residual_mlp\.gate\.{scale}=.*must share their scales"):
        make(tmp_path / "checkpoint", tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("workers", [1, 4])
def test_a_failure_leaves_nothing(
    workers: int, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repack = build.repack

    def fail_on_rank_2(tensor, source, target):  # type: ignore[no-untyped-def]
        if source.path.name == "rank2.safetensors" and tensor.spec.name == "layers.1.qkv.alpha":
            raise ArcticTrtError("the disk of this test is full")
        repack(tensor, source, target)

    monkeypatch.setattr(build, "repack", fail_on_rank_2)
    with pytest.raises(ArcticTrtError, match="the disk of this test is full"):
        make(checkpoints["tp8"], tmp_path / "engine", workers=workers)
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    make(checkpoints["tp1"], tmp_path / "engine")
    before = tree(tmp_path / "engine")
    with pytest.raises(RefusedError, match="--overwrite"):
        make(checkpoints["tp8"], tmp_path / "engine")
    assert tree(tmp_path / "engine") == before
    make(checkpoints["tp8"], tmp_path / "engine", overwrite=True)
    assert (tmp_path / "engine" / "rank7.safetensors").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_checkpoint_is_never_overwritten(overwrite: bool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["tp1"], tmp_path / "mine")
    before = tree(tmp_path / "mine")
    with pytest.raises(RefusedError, match="is the checkpoint itself"):
        make(tmp_path / "mine", tmp_path / "." / "mine", overwrite=overwrite)
    with pytest.raises(RefusedError, match="holds something that is not an engine"):
        make(checkpoints["tp8"], tmp_path / "mine", overwrite=overwrite)
    assert tree(tmp_path / "mine") == before


def test_an_unfinished_build_is_started_again(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / ".arctic-trt-unfinished").write_text('{"kind": "engine"}')
    (engine / "rank0.safetensors.partial").write_text("half")
    (engine / "rank5.safetensors").write_text("of another build")
    make(checkpoints["tp1"], engine)
    assert {path.name for path in engine.glob("rank*")} == {"rank0.safetensors"}
    assert not (engine / ".arctic-trt-unfinished").exists()


def test_a_full_disk_is_noticed_before_the_start(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(RefusedError, match=r"needs .* GB, but its disk has 0\.00 GB free"):
        make(checkpoints["tp1"], tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_a_plan_is_checked_against_the_checkpoint_it_was_made_for(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """A rank file that changes after the plan was made is noticed when it is read."""
    shutil.copytree(checkpoints["tp1"], tmp_path / "checkpoint")
    checkpoint = TrtCheckpoint(tmp_path / "checkpoint")
    plan = plan_torch_build(checkpoint, tmp_path / "engine", plan_build_config(checkpoint.config))
    with (tmp_path / "checkpoint" / "rank0.safetensors").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(CheckpointError, match="ended inside"):
        build_torch_engine(replace(plan))
    assert not (tmp_path / "engine").exists()

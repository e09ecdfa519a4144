"""What verification catches: more than forty kinds of damage, at three depths, as ``docs/verification.md`` says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from arctic_trt.errors import UsageError
from arctic_trt.model.config import parse_config
from arctic_trt.report.verify.run import plan_workers, verify, verify_structure
from tests.report.verify.damages import DAMAGES
from tests.support.checkpoints import (
    SMALL,
    TINY,
    random_checkpoint,
    random_ids,
    random_tensors,
    repeat_kv_heads,
    write_checkpoint,
    write_samples,
)
from tests.support.engines import build_engine
from tests.support.jobs import quantize

DOCS = Path(__file__).parents[3] / "docs" / "verification.md"
ARCTIC = Path(__file__).parents[2] / "data" / "arctic-config"
DEPTHS = ("structure", "values", "original")


@pytest.fixture(scope="module")
def checkpoints(tiny_model: Path, tiny_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and one of another model that is cut the same way."""
    directory = tmp_path_factory.mktemp("verify")
    stranger = random_checkpoint(directory / "stranger", TINY, seed=99)
    for model, name in ((tiny_model, "ours"), (stranger, "other")):
        quantize(model, directory / name, calib_dataset=str(tiny_samples), tp_size=4, moe_ep_size=2)
    return directory / "ours", directory / "other"


def depth_of(path: Path, model: Path) -> str:
    """The least that catches what is wrong with ``path``."""
    if not verify_structure(path).passed:
        return "structure"
    if not verify(path).passed:
        return "values"
    return "original" if not verify(path, model).passed else "nothing"


def documented() -> dict[str, str]:
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: depth for name, depth in rows if depth in DEPTHS}


def test_nothing_is_found_in_what_is_right(checkpoints: tuple[Path, Path], tiny_model: Path) -> None:
    for found in (verify_structure(checkpoints[0]), verify(checkpoints[0]), verify(checkpoints[0], tiny_model)):
        assert found.findings == [] and found.passed
    found = verify(checkpoints[0], tiny_model)
    assert len(found.qualities) == 2 * (7 + 3 * 8) and 25 < found.worst(1)[0].sqnr_db < 40
    sites = found.as_dict()["sqnr"]
    assert len(sites) == 2 * 7 and sum(site["count"] for site in sites) == len(found.qualities)
    assert all(25 < site["min_db"] <= site["mean_db"] < 40 for site in sites)
    assert min(site["min_db"] for site in sites) == found.worst(1)[0].sqnr_db
    assert {site["site"]: site["count"] for site in sites if site["layer"] == 1} == {
        **{"attention.qkv": 3, "attention.dense": 1, "mlp.fc": 16, "mlp.proj": 8},
        **{"residual_mlp.fc": 1, "residual_mlp.gate": 1, "residual_mlp.proj": 1},
    }


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_caught_where_the_docs_say(
    name: str, checkpoints: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    ours = Path(shutil.copytree(checkpoints[0], tmp_path / "ours"))
    DAMAGES[name](ours, checkpoints[1])
    assert depth_of(ours, tiny_model) == documented()[name]
    assert not verify(ours, tiny_model).passed, "deeper looks see what shallow ones see"


def test_the_docs_list_every_damage_and_no_other() -> None:
    assert documented().keys() == DAMAGES.keys() and len(DAMAGES) >= 40


def test_findings_name_file_and_tensor(checkpoints: tuple[Path, Path], tiny_model: Path, tmp_path: Path) -> None:
    ours = Path(shutil.copytree(checkpoints[0], tmp_path / "ours"))
    DAMAGES["one bit of a matrix"](ours, checkpoints[1])
    [finding] = verify(ours, tiny_model).findings
    assert (finding.kind, finding.file, finding.tensor) == (
        "payload",
        "rank3.safetensors",
        "transformer.layers.1.mlp.proj.weight",
    )
    assert "transformer.layers.1.mlp.proj.weight[0] differs in 1 of" in finding.sentence


def test_a_scale_that_nobody_computed_is_a_warning_until_the_original_is_asked(
    checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    ours = Path(shutil.copytree(checkpoints[0], tmp_path / "ours"))
    DAMAGES["an expert's scale left at 1.0"](ours, checkpoints[1])
    found = verify(ours)
    assert found.passed and {finding.kind for finding in found.findings} == {"sentinel", "outlier"}


def test_without_its_report_activation_scales_are_taken_on_trust(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    ours = Path(shutil.copytree(checkpoints[0], tmp_path / "ours"))
    shutil.rmtree(ours / "report")
    DAMAGES["activation scale of another layer"](ours, checkpoints[1])
    found = verify(ours)
    assert found.passed and [finding.kind for finding in found.findings] == ["report"]


@pytest.mark.parametrize(
    "recipe",
    [
        {"tp_size": 1},
        {"tp_size": 2, "pp_size": 2},
        {"tp_size": 8, "moe_ep_size": 8},
        {"tp_size": 16},
        {"tp_size": 2, "qformat": "full_prec"},
        {"tp_size": 2, "kv_cache_dtype": "none"},
        {"tp_size": 2, "moe_ep_size": 2, "exclude_modules": ("transformer.layers.0.attention.*", "*residual_mlp.proj")},
        {"tp_size": 2, "pp_size": 2, "exclude_modules": ("*.mlp", "*.residual_mlp.*")},
    ],
    ids=str,
)
def test_every_cut_and_format(recipe: dict[str, Any], tiny_model: Path, tiny_samples: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "out", calib_dataset=str(tiny_samples), **recipe)
    found = verify(tmp_path / "out", tiny_model)
    assert found.passed and found.findings == []
    path = tmp_path / "out" / "rank0.safetensors"
    tensors = load_file(path)
    name = "transformer.layers.0.mlp.proj.weight"
    tensors[name].view(-1)[:1] = -tensors[name].view(-1)[:1].float()
    save_file(tensors, path)
    assert [finding.tensor for finding in verify(tmp_path / "out", tiny_model).errors] == [name]


def test_repeated_kv_heads(tmp_path: Path) -> None:
    config = {**SMALL, "num_key_value_heads": 2}
    folded = random_tensors(config, 3)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    times = config["num_attention_heads"] // 2
    stated = {**config, "num_key_value_heads": config["num_attention_heads"]}
    model = write_checkpoint(tmp_path / "model", stated, repeat_kv_heads(folded, head_dim, times))
    samples = write_samples(tmp_path / "samples.jsonl", random_ids(config["vocab_size"], [8]))
    quantize(model, tmp_path / "out", calib_dataset=str(samples), tp_size=2)
    assert verify(tmp_path / "out", model).findings == []


def test_a_sample_looks_at_less(checkpoints: tuple[Path, Path], tiny_model: Path) -> None:
    whole, part = verify(checkpoints[0], tiny_model), verify(checkpoints[0], tiny_model, share=0.3)
    assert 0 < len(part.qualities) < len(whole.qualities) and part.passed


def test_another_model_is_not_compared(checkpoints: tuple[Path, Path], small_model: Path, tiny_model: Path) -> None:
    with pytest.raises(UsageError, match=r"has hidden_size 128, .* has \d+\. Give the model that it was made of"):
        verify(checkpoints[0], small_model)
    found = verify(checkpoints[1], tiny_model)
    assert len(found.errors) > 100, "the same sizes, other weights"


def test_a_torch_engine_and_its_checkpoint(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    engine = build_engine(checkpoints[0], tmp_path / "engine")
    assert verify(engine).findings == [] and verify(engine, checkpoints[0]).findings == []
    assert not verify(engine, checkpoints[1]).passed
    path = engine / "rank2.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    [finding] = verify(engine, checkpoints[0]).errors
    assert finding.file == "rank2.safetensors" and "is not what the checkpoint gives" in finding.sentence
    path.write_bytes(data[:-1])
    assert verify(engine).errors[0].kind == "file"
    path.unlink()
    assert "rank2.safetensors does not exist" in verify(engine).errors[0].sentence


def test_threads_follow_cores_and_memory() -> None:
    config = parse_config(json.loads((ARCTIC / "config.json").read_text()))
    assert plan_workers(config, 2, 8 << 30) == 2
    assert 4 <= plan_workers(config, 96, 8 << 30) <= 8 and plan_workers(config, 96, 1 << 20) == 1


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a directory"):
        verify(tmp_path / "none")
    assert verify(tmp_path).errors[0].sentence == "config.json does not exist."


def trt_engine(directory: Path, checkpoint: Path, **changes: Any) -> Path:
    """An engine directory as a build with TensorRT-LLM leaves it, with engines of a few bytes."""
    directory.mkdir()
    pretrained = json.loads((checkpoint / "config.json").read_text())
    limits = dict.fromkeys(("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "max_beam_width"), 1)
    config = {"version": "1.2.1", "pretrained_config": pretrained, "build_config": limits, **changes}
    (directory / "config.json").write_text(json.dumps(config))
    for rank in range(4):
        (directory / f"rank{rank}.engine").write_bytes(bytes(10 + rank))
    ranks = [{"rank": rank, "engine_bytes": 10 + rank} for rank in range(4)]
    (directory / "build.json").write_text(json.dumps({"fingerprint": {"tensorrt": "10.14.1", "sm": 90}, "ranks": ranks}))
    return directory


def test_a_tensorrt_engine(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    engine = trt_engine(tmp_path / "engine", checkpoints[0])
    assert verify(engine).findings == []
    (engine / "rank2.engine").write_bytes(b"short")
    assert "rank2.engine has 5 bytes, expected 12" in verify(engine).errors[0].sentence
    (engine / "rank2.engine").unlink()
    assert "rank2.engine does not exist" in verify(engine).errors[0].sentence


def test_a_tensorrt_engine_of_which_little_is_known(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    engine = trt_engine(tmp_path / "engine", checkpoints[0], version="1.3.0")
    (engine / "build.json").unlink()
    found = verify(engine)
    assert [finding.kind for finding in found.errors] == ["version"] and "engines were removed" in found.errors[0].sentence
    assert [finding.kind for finding in found.findings if finding not in found.errors] == ["record"]

"""What verification catches: kinds of damage, at three depths, with and without the reports, as ``docs/verification.md`` says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from arctic_trt.checkpoint.digests import DIGESTS
from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.errors import UsageError
from arctic_trt.model.config import parse_config
from arctic_trt.model.layer import K_CACHE, V_CACHE
from arctic_trt.model.names import hf_shapes
from arctic_trt.quantize.scales import ACTIVATION_SITES, GivenAmax
from arctic_trt.report.verify.run import plan_workers, verify, verify_structure
from tests.report.verify.damages import DAMAGES, LAYER0, LAYER1, edit, edit_config, edit_report, flip, put
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
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer, as far as files tell."""
    copy = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("verify") / "model"))
    (copy / "tokenizer.json").write_text('{"model": {}}')
    return copy


@pytest.fixture(scope="module")
def checkpoints(model: Path, tiny_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and one of another model that is cut the same way."""
    directory = tmp_path_factory.mktemp("verify")
    stranger = random_checkpoint(directory / "stranger", TINY, seed=99)
    for source, name in ((model, "ours"), (stranger, "other")):
        quantize(source, directory / name, calib_dataset=str(tiny_samples), tp_size=4, moe_ep_size=2)
    return directory / "ours", directory / "other"


def depth_of(path: Path, model: Path) -> str:
    """The least that catches what is wrong with ``path``; what is deeper must catch it too."""
    passed = [verify_structure(path).passed, verify(path).passed, passes_against(path, model)]
    assert passed == sorted(passed, reverse=True)
    return DEPTHS[passed.index(False)] if False in passed else "–"


def passes_against(path: Path, model: Path) -> bool:
    try:
        return verify(path, model).passed
    except UsageError:  # sizes of another model
        return False


def documented() -> dict[str, list[str]]:
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: depths for name, *depths in rows if depths[0] in DEPTHS}


def test_nothing_is_found_in_what_is_right(checkpoints: tuple[Path, Path], model: Path) -> None:
    for found in (verify_structure(checkpoints[0]), verify(checkpoints[0]), verify(checkpoints[0], model)):
        assert found.findings == [] and found.passed
    found = verify(checkpoints[0], model)
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
def test_each_damage_is_caught_where_the_docs_say(name: str, checkpoints: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    ours = Path(shutil.copytree(checkpoints[0], tmp_path / "ours"))
    DAMAGES[name](ours, checkpoints[1])
    with_reports = depth_of(ours, model)
    shutil.rmtree(ours / "report")
    assert [with_reports, depth_of(ours, model)] == documented()[name]


def test_the_docs_list_every_damage_and_no_other() -> None:
    assert documented().keys() == DAMAGES.keys() and len(DAMAGES) >= 40


def test_findings_name_file_and_tensor(checkpoints: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    ours = Path(shutil.copytree(checkpoints[0], tmp_path / "ours"))
    DAMAGES["one bit of a matrix"](ours, checkpoints[1])
    [finding] = verify(ours, model).findings
    assert (finding.kind, finding.file, finding.tensor) == (
        "payload",
        "rank3.safetensors",
        "transformer.layers.1.mlp.proj.weight",
    )
    assert finding.sentence == (
        "transformer.layers.1.mlp.proj.weight[0] differs from the original, quantized and cut the same way, "
        "in 1 of 6144 elements, by up to 1 e4m3 step."
    )


def test_a_scale_that_nobody_computed_is_a_warning_without_a_report(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    ours = Path(shutil.copytree(checkpoints[0], tmp_path / "ours", ignore=shutil.ignore_patterns("report")))
    DAMAGES["an expert's scale left at 1.0"](ours, checkpoints[1])
    found = verify(ours)
    assert found.passed and {finding.kind for finding in found.findings} == {"report", "digest", "sentinel", "outlier"}


def test_without_its_report_activation_scales_are_taken_on_trust(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    ours = Path(shutil.copytree(checkpoints[0], tmp_path / "ours", ignore=shutil.ignore_patterns("report")))
    DAMAGES["activation scale of another layer"](ours, checkpoints[1])
    found = verify(ours)
    assert found.passed and [finding.kind for finding in found.findings] == ["report", "digest"]


def test_a_report_of_an_earlier_version_is_a_warning(checkpoints: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    ours = Path(shutil.copytree(checkpoints[0], tmp_path / "ours"))
    edit_report(ours, lambda report: [report.pop(key) for key in ("expert_scales", "config")])
    (ours / DIGESTS).unlink()
    found = verify(ours, model)
    assert found.passed and [finding.kind for finding in found.findings] == ["report", "digest"]
    assert "is of an earlier version and lacks expert_scales and config" in found.findings[0].sentence
    DAMAGES["one bit of a scale, on all ranks"](ours, checkpoints[1])
    assert not verify_structure(ours).passed, "what it does record still counts"


def test_each_value_of_a_file_is_named(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    ours = Path(shutil.copytree(checkpoints[0], tmp_path / "ours"))
    (ours / DIGESTS).unlink()
    edit(ours, lambda t: t[f"{LAYER1}mlp.fc.weights_scaling_factor"].view(-1)[2].mul_(1.5), [1, 3])
    edit_config(ours, lambda raw: raw["moe"].update(top_k=4, extra=1))  # type: ignore[attr-defined]
    found = {(finding.kind, finding.file): finding.sentence for finding in verify_structure(ours).errors}
    assert "layer 1 mlp.fc.weights_scaling_factor of expert 6 is " in found["scale", "rank1.safetensors"]
    sentences = [finding.sentence for finding in verify_structure(ours).errors if finding.kind == "config"]
    assert sentences == ["config.json has moe.extra=1, which was not written there.", "config.json has moe.top_k=4, expected 2."]


def quantize_with_other_scales(model: Path, out: Path, samples: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ModelOpt's algorithms that choose a smaller maximum than the largest weight."""
    config = parse_config(json.loads((model / "config.json").read_text()))
    source = HfCheckpoint(model)
    weights = {name: source.read(name).abs().max().float() * 0.77 for name in hf_shapes(config) if "mlp" in name or "moe" in name}
    sites = [dict.fromkeys((*ACTIVATION_SITES.values(), K_CACHE, V_CACHE), torch.tensor(3.0))] * config.num_hidden_layers
    monkeypatch.setattr("arctic_trt.quantize.job._ask_modelopt", lambda *arguments: GivenAmax(sites, weights))
    options = {"calibrator": "modelopt", "calib_algorithm": algorithm, "tp_size": 4, "moe_ep_size": 2}
    quantize(model, out, calib_dataset=str(samples), **options)


def test_scales_that_modelopt_chose_are_those_of_the_report(
    model: Path, tiny_samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    quantize_with_other_scales(model, out, tiny_samples, "mse", monkeypatch)
    assert verify(out, model).findings == []
    edit(out, lambda t: put(t, f"{LAYER0}mlp.fc.weight", flip(t[f"{LAYER0}mlp.fc.weight"], 9, 1)), [1])
    assert [finding.kind for finding in verify(out, model).errors] == ["payload"]
    shutil.rmtree(out / "report")
    found = {finding.kind for finding in verify(out, model).errors}
    assert found == {"payload", "scale"}, "without the record nobody knows why the scales are what they are"


def test_no_report_excuses_scales_that_are_said_to_be_maxima(
    model: Path, tiny_samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_with_other_scales(model, tmp_path / "out", tiny_samples, "max", monkeypatch)
    assert verify_structure(tmp_path / "out").passed
    assert {finding.kind for finding in verify(tmp_path / "out", model).errors} == {"payload", "scale"}


def test_scales_of_a_gpu_are_a_warning(model: Path, tiny_samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def times_reciprocal(amax: Tensor) -> Tensor:
        return amax.float() * torch.tensor(1 / 448)

    monkeypatch.setattr("arctic_trt.quantize.scales.scale_from_amax", times_reciprocal)
    quantize(model, tmp_path / "out", calib_dataset=str(tiny_samples), tp_size=4, moe_ep_size=2)
    monkeypatch.undo()
    assert {finding.kind for finding in verify(tmp_path / "out", model).errors} >= {"scale"}, "our own are divided"
    shutil.rmtree(tmp_path / "out" / "report")
    found = verify(tmp_path / "out", model)
    assert found.passed and sorted(finding.kind for finding in found.findings) == ["digest", "report", "rounding"]


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


def test_a_sample_looks_at_less(checkpoints: tuple[Path, Path], model: Path) -> None:
    whole, part = verify(checkpoints[0], model), verify(checkpoints[0], model, share=0.3)
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
    [finding] = verify(engine).errors
    assert (finding.kind, finding.file) == ("digest", "rank2.safetensors") and "is not what was written" in finding.sentence
    path.write_bytes(data[:-1])
    assert verify(engine).errors[0].kind == "file"
    path.unlink()
    assert "rank2.safetensors does not exist" in verify(engine).errors[0].sentence


def test_an_engine_without_digests_and_one_of_a_checkpoint_that_cannot_be_joined(
    checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    engine = build_engine(checkpoints[0], tmp_path / "engine")
    shutil.rmtree(engine / "report")
    found = verify(engine)
    assert found.passed and [finding.kind for finding in found.findings] == ["digest"]
    spoiled = Path(shutil.copytree(checkpoints[0], tmp_path / "spoiled"))
    DAMAGES["fc and gate with scales of their own"](spoiled, checkpoints[1])
    sentences = [finding.sentence for finding in verify(engine, spoiled).errors]
    assert any("must share their scales" in sentence for sentence in sentences)


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

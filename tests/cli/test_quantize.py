"""``arctic-trt quantize`` when all is well: flags, recipes, output, and what it prints where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from safetensors import safe_open

from arctic_trt.cli.quantize import command
from tests.conftest import Finished
from tests.support.checkpoints import SMALL, random_ids, random_tensors, repeat_kv_heads, write_checkpoint, write_samples
from tests.support.jobs import Job, lasting, read_report, tree
from tests.support.tokenizers import write_tokenizer

REPORT_KEYS = {
    "output_dir",
    "tensors",
    "bytes_read",
    "bytes_written",
    "seconds",
    "peak_rss_bytes",
    "resumed_layers",
    "experts_without_tokens",
}


def resolved(done: Finished) -> dict[str, Any]:
    """The recipe that a --json run says it used."""
    assert done.code == 0, done.err
    recipe: dict[str, Any] = json.loads(done.out)["recipe"]
    return recipe


def test_a_run_writes_a_checkpoint_and_says_so(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt(*job.argv())
    assert done.code == 0
    assert sorted(tree(job.output_dir) or {}) == [
        "config.json",
        "rank0.safetensors",
        "rank1.safetensors",
        "report",
        "report/digests.json",
        "report/quantize.json",
    ]
    assert done.out.startswith("Quantized\n") and str(job.output_dir) in done.out
    lines = done.err.splitlines()
    assert any("calibrating with 3 samples, 21 tokens" in line for line in lines)
    assert [line.split()[:2] for line in lines if line.startswith("layer ")] == [["layer", "1/2"], ["layer", "2/2"]]


def test_json_prints_exactly_one_object(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt(*job.argv("--json"))
    assert done.code == 0 and done.out.count("\n") == 1
    report = json.loads(done.out)
    assert report.keys() >= REPORT_KEYS
    assert report["output_dir"] == str(job.output_dir) and report["resumed_layers"] == 0
    assert report["tensors"] == 2 * (3 + 26 * 2)
    assert "layer 1/2" in done.err


def test_quiet_prints_nothing(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    assert arctic_trt(*job.argv("-q")) == Finished(0, "", "")


def test_quiet_json_prints_the_object_alone(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt(*job.argv("-q", "--json"))
    assert done.err == "" and json.loads(done.out).keys() >= REPORT_KEYS


def test_dry_run_checks_everything_and_writes_nothing(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    before = tree(job.output_dir.parent)
    done = arctic_trt(*job.argv("--dry_run", "--json"))
    assert done.code == 0 and tree(job.output_dir.parent) == before
    forecast = json.loads(done.out)
    assert arctic_trt(*job.argv()).code == 0
    sizes = [(job.output_dir / f"rank{rank}.safetensors").stat().st_size for rank in (0, 1)]
    assert forecast["rank_bytes"] == sizes and forecast["output_bytes"] == sum(sizes)
    assert forecast["checkpoint_bytes"] == sum(tensor.nbytes for tensor in random_tensors(SMALL).values())
    assert arctic_trt(*job.argv("--dry-run", "--tp_size", 1)).code == 3, "an occupied directory is noticed"


def test_dry_run_for_a_person(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt(*job.argv("--dry_run"))
    assert done.code == 0 and done.out.startswith("Would write\n") and not job.output_dir.exists()


def test_flags_take_hyphens_and_underscores(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    words = [word.replace("_", "-") if word.startswith("--") else word for word in job.argv("--kv_cache_dtype", "fp8")]
    assert any("-" in word.lstrip("-") for word in words if word.startswith("--"))
    hyphens = resolved(arctic_trt(*words, "--batch-size=2", "--dry-run", "--json"))
    underscores = resolved(arctic_trt(*job.argv("--kv_cache_dtype", "fp8", "--batch_size", 2, "--dry_run", "--json")))
    assert hyphens == underscores and hyphens["batch_size"] == 2


def test_the_official_command_line_is_accepted(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    job.flags = {"--tp_size": 1}
    official = "--dtype bfloat16 --qformat fp8 --kv_cache_dtype fp8 --batch_size 1 --calib_size 128"
    assert arctic_trt(*job.argv(*official.split())).code == 0


def test_a_flag_wins_over_the_recipe_which_wins_over_the_default(
    job: Job, arctic_trt: Callable[..., Finished], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("calib_size: 2\nbatch_size: 3\ntp_size: 4\n")
    found = resolved(arctic_trt(*job.argv("--config", recipe, "--batch_size", 5, "--dry_run", "--json")))
    assert (found["tp_size"], found["calib_size"], found["batch_size"], found["seed"]) == (2, 2, 5, 1234)


def test_a_recipe_can_hold_everything(job: Job, arctic_trt: Callable[..., Finished], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_dir: {job.model_dir}\noutput_dir: {job.output_dir}\nqformat: full_prec\ntp_size: 1\noverwrite: true\n"
    )
    for _ in range(2):
        assert arctic_trt("quantize", "--config", recipe).code == 0
    assert (tree(job.output_dir) or {}).keys() >= {"config.json", "rank0.safetensors"}


def test_modules_that_stay_in_bf16_are_announced_and_reported(
    job: Job, arctic_trt: Callable[..., Finished], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("exclude_modules: [transformer.layers.0.mlp, '*.attention.*']\n")
    done = arctic_trt(*job.argv("--config", recipe))
    kept = "layer 0 attention.dense, layer 0 attention.qkv, layer 0 mlp, layer 1 attention.dense, layer 1 attention.qkv"
    assert done.code == 0 and f"kept in bf16: {kept}\n" in done.err
    report = read_report(job.output_dir)
    assert report["recipe"]["exclude_modules"] == ["transformer.layers.0.mlp", "*.attention.*"]
    assert len(report["modules_in_bf16"]) == 5
    again = arctic_trt(*job.argv("--config", recipe))
    assert again.code == 0 and "already holds exactly this checkpoint" in again.err
    flag = arctic_trt(*job.argv("--config", recipe, "--exclude_modules", "transformer.layers.*", "--overwrite"))
    assert flag.code == 0 and "layer 1 attention.qkv and 4 more\n" in flag.err


def test_defaults(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    words = ["--model_dir", job.model_dir, "--output_dir", job.output_dir, "--calib_dataset", job.calib, "--tp_size", 1]
    found = resolved(arctic_trt("quantize", *words, "--dry_run", "--json"))
    assert {key: found[key] for key in ("dtype", "qformat", "pp_size", "calib_size", "calib_max_seq_length", "batch_size")} == {
        "dtype": "bfloat16",
        "qformat": "fp8",
        "pp_size": 1,
        "calib_size": 128,
        "calib_max_seq_length": 512,
        "batch_size": 1,
    }


def test_without_an_fp8_cache_there_is_no_cache_scale(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    assert arctic_trt(*job.argv("--kv_cache_dtype", "none")).code == 0
    with safe_open(job.output_dir / "rank0.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "kv_cache" in name]  # noqa: SIM118 - safe_open is no mapping
    assert json.loads((job.output_dir / "config.json").read_text())["quantization"]["kv_cache_quant_algo"] is None


def test_overwrite_replaces_a_finished_checkpoint(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    assert arctic_trt(*job.argv()).code == 0
    first = lasting(job.output_dir)
    assert arctic_trt(*job.argv("--overwrite", "--tp_size", 1)).code == 0
    assert "rank1.safetensors" not in lasting(job.output_dir)
    assert arctic_trt(*job.argv("--overwrite")).code == 0
    assert lasting(job.output_dir) == first


def test_the_same_command_again_is_done_at_once(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    first = arctic_trt(*job.argv("--json"))
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in job.output_dir.rglob("*")}
    again = arctic_trt(*job.argv("--json"))
    assert (again.code, json.loads(again.out)) == (0, json.loads(first.out))
    assert f"{job.output_dir} already holds exactly this checkpoint; nothing to do (--overwrite makes it again).\n" in again.err
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in job.output_dir.rglob("*")} == before
    assert arctic_trt(*job.argv("--memory_budget", "16GiB", "--seed", 5, "-q")) == Finished(0, "", ""), "they change no byte"


def test_a_finished_checkpoint_that_lacks_a_file_is_not_taken_for_whole(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    assert arctic_trt(*job.argv()).code == 0
    expected = lasting(job.output_dir)
    (job.output_dir / "rank1.safetensors").unlink()
    assert arctic_trt(*job.argv()).code == 3
    assert arctic_trt(*job.argv("--overwrite", "-q")) == Finished(0, "", "") and lasting(job.output_dir) == expected


def test_a_budget_that_is_too_small_is_refused_with_what_it_takes(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt(*job.argv("--memory_budget", "100MiB"))
    assert done.code == 3 and not job.output_dir.exists()
    assert "The memory budget of 0.10 GiB is too small: this checkpoint needs 0." in done.err


def test_cuda_is_refused_where_there_is_none(
    job: Job, arctic_trt: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = arctic_trt(*job.argv("--device", "cuda"))
    assert done.code == 3 and "no CUDA device" in done.err and not job.output_dir.exists()


def test_experts_without_tokens_are_reported(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    write_samples(job.calib, random_ids(SMALL["vocab_size"], [1]))
    done = arctic_trt(*job.argv("--json"))
    unseen = json.loads(done.out)["experts_without_tokens"]
    assert len(unseen) >= 4
    layer, expert = unseen[0]
    assert f"warning: {len(unseen)} experts saw no calibration token (layer {layer} expert {expert}, " in done.err


def test_zero_weights_are_warned_about(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    job.edit_shard(name, lambda tensors: tensors[name].zero_())
    done = arctic_trt(*job.argv())
    assert done.code == 0
    assert f"WARNING: {name}: all weights are zero; its scale is set to 1." in done.err


def test_folded_kv_heads_are_announced(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    write_checkpoint(job.model_dir, {**SMALL, "num_key_value_heads": 4}, repeat_kv_heads(random_tensors(SMALL), 8, 2))
    done = arctic_trt(*job.argv("--json"))
    assert "stores each KV head 2 times: 4 heads are folded to 2, which loses nothing" in done.err
    assert json.loads(done.out)["kv_heads_folded_from"] == 4


def test_the_default_calibration_set_is_used_when_none_is_named(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    write_tokenizer(job.model_dir)
    words = [
        "--model_dir",
        job.model_dir,
        "--output_dir",
        job.output_dir,
        "--tp_size",
        1,
        "--calib_size",
        3,
        "--calib_max_seq_length",
        9,
    ]
    report = json.loads(arctic_trt("quantize", *words, "--json").out)
    assert (report["calibration_samples"], report["calibration_tokens"]) == (3, 27)


FROZEN_FLAGS = {
    "--model_dir": "directory",
    "--output_dir": "directory",
    "--dtype": "bfloat16|auto",
    "--qformat": "fp8|full_prec",
    "--kv_cache_dtype": "fp8|none",
    "--tp_size": "integer",
    "--pp_size": "integer",
    "--moe_tp_size": "integer",
    "--moe_ep_size": "integer",
    "--calib_dataset": "text",
    "--calib_size": "integer",
    "--calib_max_seq_length": "integer",
    "--batch_size": "integer",
    "--exclude_modules": "text",
    "--seed": "integer",
    "--calibrator": "streaming|modelopt",
    "--calib_algorithm": "text",
    "--device": "cpu|cuda",
    "--workers": "integer",
    "--memory_budget": "text",
    "--overwrite": "flag",
    "--no_verify": "flag",
    "--no_report": "flag",
    "--dry_run": "flag",
    "--config": "file",
    "--json": "flag",
    "-q/--quiet": "flag",
    "-v/--verbose": "flag",
}


def test_the_flags_are_frozen() -> None:
    """Scripts depend on every one of these: a change here is a change of the interface."""

    def kind(option: click.Option) -> str:
        choices = getattr(option.type, "choices", None)
        return "flag" if option.is_flag else "|".join(choices) if choices else option.type.name

    options = [param for param in command.params if isinstance(param, click.Option)]
    assert {"/".join(option.opts): kind(option) for option in options} == FROZEN_FLAGS


def test_every_flag_is_explained_in_the_help(arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt("quantize", "--help")
    assert done.code == 0 and done.err == ""
    for option in command.params:
        assert isinstance(option, click.Option) and option.help and option.opts[-1] in done.out

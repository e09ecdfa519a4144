"""``arctic-trt quantize`` with every kind of bad input: exit code, one sentence that names the culprit, nothing left behind."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from arctic_trt.model.config import ArcticConfig
from tests.conftest import Finished
from tests.support.checkpoints import SMALL, random_tensors, repeat_kv_heads, write_checkpoint, write_samples
from tests.support.jobs import Job, lasting, tree

Spoil = Callable[[Job], object]
ArcticTrt = Callable[..., Finished]

FAILED, USAGE, REFUSED = 1, 2, 3
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
LAST_SHARD = "model-00002-of-00002.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4975023880\n"


def check_refusal(
    done: Finished, code: int, fragments: Sequence[object], job: Job, before: dict[str, bytes | None] | None
) -> None:
    """One line on stderr with all ``fragments``, nothing on stdout, and the output directory as it was."""
    assert done.code == code, done.err
    assert done.out == ""
    assert done.err.startswith("arctic-trt: error: ") and done.err.count("\n") == 1, done.err
    for fragment in fragments:
        assert str(fragment) in done.err
    assert "Unexpected" not in done.err and "Traceback" not in done.err
    assert tree(job.output_dir) == before


def refuse(job: Job, arctic_trt: ArcticTrt, code: int, *fragments: object, flags: Sequence[object] = ()) -> None:
    before = tree(job.output_dir)
    check_refusal(arctic_trt(*job.argv("-q", *flags)), code, fragments, job, before)


@pytest.mark.parametrize("key", ["architectures", *ArcticConfig.model_fields])
def test_a_missing_key(key: str, job: Job, arctic_trt: ArcticTrt) -> None:
    job.edit_config(lambda raw: raw.pop(key))
    refuse(job, arctic_trt, USAGE, job.model_dir / "config.json", f"lacks the key '{key}'")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda job: (job.model_dir / "config.json").unlink(), "config.json does not exist"),
        (lambda job: shutil.rmtree(job.model_dir), "config.json does not exist"),
        (lambda job: (job.model_dir / "config.json").write_text('{"hidden_size": '), "is not valid JSON"),
        (lambda job: job.edit_config(lambda raw: raw.update(architectures=["MixtralForCausalLM"])), "['MixtralForCausalLM']"),
        (lambda job: job.edit_config(lambda raw: raw.update(hidden_size="32")), "hidden_size='32'"),
        (
            lambda job: job.edit_config(lambda raw: raw.update(use_residual=False)),
            "use_residual=False but parallel_attn_mlp_res=True",
        ),
        (lambda job: job.edit_config(lambda raw: raw.update(moe_layer_frequency=2)), "moe_layer_frequency=2"),
    ],
)
def test_a_bad_config_json(spoil: Spoil, complaint: str, job: Job, arctic_trt: ArcticTrt) -> None:
    spoil(job)
    refuse(job, arctic_trt, USAGE, job.model_dir / "config.json", complaint)


def cut_last_shard(size: Callable[[bytes], int]) -> Spoil:
    def cut(job: Job) -> None:
        path = job.model_dir / LAST_SHARD
        data = path.read_bytes()
        path.write_bytes(data[: size(data)])

    return cut


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


BAD_SHARDS: dict[str, tuple[Spoil, str]] = {
    "missing": (lambda job: (job.model_dir / LAST_SHARD).unlink(), "does not exist"),
    "empty": (cut_last_shard(lambda data: 0), "is truncated"),
    "cut in the length": (cut_last_shard(lambda data: 5), "is truncated"),
    "cut after the length": (cut_last_shard(lambda data: 8), "is truncated"),
    "cut in the header": (cut_last_shard(lambda data: header_end(data) // 2), "is truncated"),
    "cut before the data": (cut_last_shard(header_end), "is truncated"),
    "cut in the data": (cut_last_shard(lambda data: len(data) - 1), "is truncated"),
    "bytes at the end": (lambda job: append(job.model_dir / LAST_SHARD, b"\0\0"), "but its header describes"),
    "Git-LFS pointer": (lambda job: (job.model_dir / LAST_SHARD).write_text(POINTER), "is a Git-LFS pointer"),
}


@pytest.mark.parametrize(("spoil", "complaint"), BAD_SHARDS.values(), ids=BAD_SHARDS.keys())
def test_a_bad_shard(spoil: Spoil, complaint: str, job: Job, arctic_trt: ArcticTrt) -> None:
    spoil(job)
    refuse(job, arctic_trt, FAILED, job.model_dir / LAST_SHARD, complaint)


def rename(job: Job, old: str, new: str) -> None:
    """Give a tensor another name, in its shard and in the index."""
    job.edit_shard(old, lambda tensors: tensors.update({new: tensors.pop(old)}))
    job.edit_index(lambda names: names.update({new: names.pop(old)}))


def drop_expert(job: Job) -> None:
    for matrix in ("w1", "w2", "w3"):
        name = EXPERT.replace("w1", matrix)
        job.edit_shard(name, lambda tensors, name=name: tensors.pop(name))
        job.edit_index(lambda names, name=name: names.pop(name))


def put_in_two_shards(job: Job) -> None:
    job.edit_shard(
        "lm_head.weight", lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(64, 32).bfloat16()})
    )


FIRST_SHARD = "model-00001-of-00002.safetensors"
BAD_SETS: dict[str, tuple[Spoil, int, str]] = {
    "no index": (lambda job: job.index.unlink(), FAILED, "has neither model.safetensors.index.json nor model.safetensors"),
    "no weight_map": (lambda job: job.index.write_text("{}"), USAGE, "index.json is not a safetensors index"),
    "weight_map of a number": (lambda job: job.index.write_text('{"weight_map": {"a": 1}}'), USAGE, "index.json is not"),
    "weight_map is a text": (lambda job: job.index.write_text('{"weight_map": "all"}'), USAGE, "index.json is not"),
    "index names an absent tensor": (
        lambda job: job.edit_index(lambda names: names.update(absent=LAST_SHARD)),
        FAILED,
        f"{LAST_SHARD} lacks absent",
    ),
    "index names an absent shard": (
        lambda job: job.edit_index(lambda names: names.update(absent="model-3.safetensors")),
        FAILED,
        "model-3.safetensors does not exist",
    ),
    "tensor in two shards": (put_in_two_shards, FAILED, "holds model.embed_tokens.weight in more than one shard"),
    "tensor in no shard of the index": (
        lambda job: job.edit_index(lambda names: names.pop(ROUTER)),
        FAILED,
        f"holds {ROUTER}, which model.safetensors.index.json places in no shard",
    ),
    "tensor in another shard": (
        lambda job: job.edit_index(lambda names: names.update({ROUTER: FIRST_SHARD})),
        FAILED,
        f"holds {ROUTER}, which model.safetensors.index.json places in {FIRST_SHARD}",
    ),
    "missing expert": (drop_expert, FAILED, f"lacks tensor {EXPERT} and 2 more tensors"),
    "renamed tensor": (lambda job: rename(job, ROUTER, ROUTER.replace("gate", "router")), FAILED, f"lacks tensor {ROUTER}."),
    "extra tensors": (
        lambda job: job.edit_config(lambda raw: raw.update(num_local_experts=3)),
        FAILED,
        "holds the unexpected tensor model.layers.0.block_sparse_moe.experts.3.w1.weight and 5 more tensors",
    ),
    "missing layer": (
        lambda job: job.edit_config(lambda raw: raw.update(num_hidden_layers=3)),
        FAILED,
        "lacks tensor model.layers.2.block_sparse_moe.experts.0.w1.weight and 22 more tensors",
    ),
}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--exclude_modules", "*.router"], "--exclude_modules '*.router' matches no module that is quantized"),
        (
            ["--exclude_modules", "*.mlp", "--exclude_modules", "transformer.layers.2.mlp"],
            "N from 0 to 1, X one of attention.qkv",
        ),
        (["--exclude_modules", "*.residual_mlp.fc"], "Exclude both or none"),
        (["--exclude_modules", "transformer.layers.0.mlp.proj"], "Exclude transformer.layers.0.mlp, or"),
        (
            ["--exclude_modules", "transformer.layers.0.mlp", "--pp_size", 2],
            "in 2 pipeline stages TensorRT-LLM counts layers from 0",
        ),
        (["--exclude_modules", "*.mlp", "--qformat", "full_prec"], "with --qformat full_prec all of it is"),
    ],
)
def test_exclusions_that_cannot_be_meant(flags: list[object], complaint: str, job: Job, arctic_trt: ArcticTrt) -> None:
    refuse(job, arctic_trt, USAGE, complaint, flags=flags)


@pytest.mark.parametrize(("spoil", "code", "complaint"), BAD_SETS.values(), ids=BAD_SETS.keys())
def test_a_bad_set_of_tensors(spoil: Spoil, code: int, complaint: str, job: Job, arctic_trt: ArcticTrt) -> None:
    spoil(job)
    refuse(job, arctic_trt, code, job.model_dir, complaint)


@pytest.mark.parametrize(
    ("name", "value", "fragments"),
    [
        (EXPERT, torch.zeros(17, 32).bfloat16(), ["has shape [17, 32], config.json asks for [16, 32]"]),
        ("model.norm.weight", torch.zeros(32, 1).bfloat16(), ["has shape [32, 1], config.json asks for [32]"]),
        (ROUTER, torch.zeros(4, 32), ["is F32, expected BF16"]),
        (EXPERT, torch.zeros(16, 32).half(), ["as F16, expected one of"]),
        (EXPERT, torch.zeros(16, 32).to(torch.float8_e4m3fn), ["is F8_E4M3, expected BF16"]),
        ("model.layers.0.self_attn.k_proj.weight", torch.zeros(24, 32).bfloat16(), ["has 24 rows", "num_key_value_heads=2"]),
    ],
)
def test_a_wrong_shape_or_dtype(name: str, value: torch.Tensor, fragments: list[str], job: Job, arctic_trt: ArcticTrt) -> None:
    job.edit_shard(name, lambda tensors: tensors.update({name: value}))
    refuse(job, arctic_trt, FAILED, job.home(name), name, *fragments)


@pytest.mark.parametrize("qformat", ["fp8", "full_prec"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [
        EXPERT,
        EXPERT.replace("w1", "w2"),
        ROUTER,
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.residual_mlp.w3.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.0.residual_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_weight_that_is_not_finite(name: str, value: float, qformat: str, job: Job, arctic_trt: ArcticTrt) -> None:
    job.edit_shard(name, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    refuse(job, arctic_trt, FAILED, name, "contains NaN or infinity", flags=["--qformat", qformat])


def test_kv_heads_that_one_layer_does_not_repeat(job: Job, arctic_trt: ArcticTrt) -> None:
    config = {**SMALL, "num_hidden_layers": 3, "num_key_value_heads": 2}
    tensors = repeat_kv_heads(random_tensors(config), 8, 2)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name][8] += 1
    write_checkpoint(job.model_dir, config, tensors)
    refuse(job, arctic_trt, FAILED, name, "does not repeat its KV heads 2 times")


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--tp_size", 3], ["--tp_size 3 does not divide num_attention_heads=4"]),
        (["--tp_size", 0], ["--tp_size 0 is not valid", "greater than or equal to 1"]),
        (
            ["--tp_size", 4, "--moe_tp_size", 2, "--moe_ep_size", 4],
            ["--moe_tp_size (2) times --moe_ep_size (4) is not --tp_size 4"],
        ),
        (["--pp_size", 3], ["--pp_size 3 exceeds num_hidden_layers=2"]),
        (["--calib_size", 0], ["--calib_size 0 is not valid"]),
        (["--batch_size", -1], ["--batch_size -1 is not valid"]),
        (["--calib_dataset", "no-such-set"], ["--calib_dataset no-such-set is neither a file nor one of default, heldout"]),
        (["--config", "no-such.yaml"], ["no-such.yaml does not exist"]),
        (["--tp_sizes", 2], ["No such option", "--tp_sizes", "--tp_size"]),
        (["--qformat", "int8"], ["--qformat", "int8", "full_prec"]),
        (["--kv_cache_dtype", "int8"], ["--kv_cache_dtype", "int8", "fp8"]),
        (
            ["--kv_cache_dtype", "fp8", "--qformat", "full_prec"],
            ["--kv_cache_dtype fp8 needs scales, which --qformat full_prec does not calibrate"],
        ),
        (["--memory_budget", "much"], ["--memory_budget 'much' is not a size", "8GiB"]),
        (["--memory_budget", "-1GB"], ["--memory_budget '-1GB' is not positive"]),
        (["--calib_algorithm", "mse"], ["--calib_algorithm mse needs --calibrator modelopt"]),
        (["--calibrator", "modelopt", "--calib_algorithm", "awq_lite"], ["--calib_algorithm 'awq_lite' is not valid", "'mse'"]),
        (["--workers", 0], ["--workers 0 is not valid", "greater than or equal to 1"]),
        (["--calibrator", "nvidia"], ["--calibrator", "nvidia", "streaming", "modelopt"]),
    ],
)
def test_a_flag_that_does_not_fit(flags: list[object], fragments: list[str], job: Job, arctic_trt: ArcticTrt) -> None:
    refuse(job, arctic_trt, USAGE, *fragments, flags=flags)


@pytest.mark.parametrize("missing", ["--model_dir", "--output_dir"])
def test_a_required_flag_that_is_missing(missing: str, job: Job, arctic_trt: ArcticTrt) -> None:
    words = job.argv("-q")
    del words[words.index(missing) : words.index(missing) + 2]
    check_refusal(arctic_trt(*words), USAGE, [f"{missing} is required"], job, None)


@pytest.mark.parametrize(
    ("recipe", "fragments"),
    [
        ("calib_sise: 4", ["unknown key 'calib_sise'", "Did you mean 'calib_size'?"]),
        ("tp-size: 4", ["unknown key 'tp-size'", "Did you mean 'tp_size'?"]),
        ("zzz: 4", ["unknown key 'zzz'", "Known keys: qformat,", "model_dir, output_dir,"]),
        ("calib_size: many", ["calib_size 'many' is not valid"]),
        ("qformat: int4", ["qformat 'int4' is not valid"]),
        ("a: [", ["is not valid YAML"]),
        ("- tp_size", ["holds a list, expected a mapping"]),
        ("4: 5", ["expected a mapping"]),
    ],
)
def test_a_bad_recipe(recipe: str, fragments: list[str], job: Job, arctic_trt: ArcticTrt, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    refuse(job, arctic_trt, USAGE, path, *fragments, flags=["--config", path])


@pytest.mark.parametrize(
    ("lines", "fragments"),
    [
        (None, ["is neither a file nor one of"]),
        ([], ["holds no samples"]),
        (["", "  "], ["holds no samples"]),
        (['{"input_ids": [1]}', "", '{"input_ids": [1'], ["line 3 is not valid JSON"]),
        (['{"input_ids": [1]}', "[1]"], ["line 2 holds a list"]),
        (['{"input_ids": "1"}'], ["line 1: input_ids must be a list of integers"]),
        (['{"input_ids": []}'], ["line 1 has no tokens"]),
        (['{"input_ids": [64]}'], ["line 1 has token ids outside 0..63"]),
        (['{"prompt": "a"}'], ["line 1 has none of the keys text, messages, input_ids"]),
        (['{"messages": [{"role": 1}]}'], ["line 1: messages must be a list"]),
    ],
)
def test_bad_calibration_data(lines: list[str] | None, fragments: list[str], job: Job, arctic_trt: ArcticTrt) -> None:
    job.calib.unlink()
    if lines is not None:
        job.calib.write_text("\n".join(lines))
    refuse(job, arctic_trt, USAGE, job.calib, *fragments)


def test_a_named_data_set_without_its_package(job: Job, arctic_trt: ArcticTrt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(job.calib.parent / "cache"))
    refuse(
        job,
        arctic_trt,
        REFUSED,
        "--calib_dataset cnn_dailymail needs the package datasets, which is not installed",
        "pip install 'arctic-trt[datasets]'",
        "--calib_dataset default",
        flags=["--calib_dataset", "cnn_dailymail"],
    )


@pytest.mark.parametrize("sample", [{"text": "hello"}, {"messages": [{"role": "user", "content": "hello"}]}])
def test_text_without_a_tokenizer(sample: object, job: Job, arctic_trt: ArcticTrt) -> None:
    write_samples(job.calib, [sample])
    refuse(job, arctic_trt, USAGE, job.model_dir / "tokenizer.json", "does not exist", "or give prompts as token ids")


def test_a_broken_tokenizer(job: Job, arctic_trt: ArcticTrt) -> None:
    write_samples(job.calib, [{"text": "hello"}])
    (job.model_dir / "tokenizer.json").write_text("{}")
    refuse(job, arctic_trt, USAGE, job.model_dir / "tokenizer.json", "cannot be loaded")


def occupy(job: Job, *names: str) -> None:
    for name in names:
        (job.output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (job.output_dir / name).write_text("precious")


@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    "other", [["--tp_size", 1], ["--calib_size", 2], ["--kv_cache_dtype", "none"]], ids=lambda other: other[0]
)
def test_a_finished_checkpoint_is_not_overwritten_unasked(
    other: list[object], more: list[str], job: Job, arctic_trt: ArcticTrt
) -> None:
    assert arctic_trt(*job.argv()).code == 0
    refuse(job, arctic_trt, REFUSED, f"{job.output_dir} is not empty", "--overwrite", flags=[*other, *more])


@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=["plain", "overwrite"])
@pytest.mark.parametrize(
    "names", [("notes.txt",), ("config.json", "model.safetensors"), ("report/notes.txt",), ("a/b/c.txt", "config.json")]
)
def test_foreign_files_are_never_deleted(names: tuple[str, ...], more: list[str], job: Job, arctic_trt: ArcticTrt) -> None:
    occupy(job, *names)
    refuse(job, arctic_trt, REFUSED, f"{job.output_dir} already holds", "Choose an empty or new --output_dir", flags=more)


def test_an_engine_is_never_overwritten(job: Job, arctic_trt: ArcticTrt, tmp_path: Path) -> None:
    assert arctic_trt(*job.argv()).code == 0
    assert arctic_trt("build", "--checkpoint_dir", job.output_dir, "--output_dir", tmp_path / "engine").code == 0
    job.output_dir = tmp_path / "engine"
    refuse(job, arctic_trt, REFUSED, "engine holds an engine, which is not overwritten", flags=["--overwrite"])


def test_the_model_itself_is_never_the_output(job: Job, arctic_trt: ArcticTrt) -> None:
    job.output_dir = job.model_dir
    refuse(job, arctic_trt, REFUSED, f"{job.model_dir} already holds", flags=["--overwrite"])


def test_a_file_is_no_output_directory(job: Job, arctic_trt: ArcticTrt) -> None:
    job.output_dir.write_text("precious")
    before = tree(job.output_dir.parent)
    done = arctic_trt(*job.argv("-q"))
    assert done.code == USAGE and str(job.output_dir) in done.err and done.err.count("\n") == 1 and done.out == ""
    assert tree(job.output_dir.parent) == before


def test_a_directory_that_cannot_be_made(job: Job, arctic_trt: ArcticTrt) -> None:
    job.output_dir = job.calib / "out"
    done = arctic_trt(*job.argv("-q"))
    assert done.code == REFUSED and f"{job.output_dir} cannot be written" in done.err and done.out == ""


@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["run", "dry run"])
def test_a_disk_that_is_too_small(more: list[str], job: Job, arctic_trt: ArcticTrt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refuse(job, arctic_trt, REFUSED, job.output_dir, "GB, but its disk has 0.00 GB free", flags=more)


def test_a_disk_that_is_too_small_costs_no_finished_checkpoint(
    job: Job, arctic_trt: ArcticTrt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job.flags = {"--tp_size": 1, "--qformat": "full_prec"}
    assert arctic_trt(*job.argv()).code == 0
    config = {**SMALL, "num_hidden_layers": 4}
    job.model_dir = write_checkpoint(tmp_path / "larger", config, random_tensors(config))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    refuse(job, arctic_trt, REFUSED, "free", flags=["--overwrite"])


def test_bad_input_is_noticed_before_a_finished_checkpoint_is_overwritten(job: Job, arctic_trt: ArcticTrt) -> None:
    assert arctic_trt(*job.argv()).code == 0
    (job.model_dir / LAST_SHARD).unlink()
    refuse(job, arctic_trt, FAILED, LAST_SHARD, flags=["--overwrite"])


def test_a_failure_in_the_middle_leaves_no_output_and_the_next_run_succeeds(job: Job, arctic_trt: ArcticTrt) -> None:
    assert arctic_trt(*job.argv()).code == 0
    expected = lasting(job.output_dir)
    shutil.rmtree(job.output_dir)
    good = tree(job.model_dir) or {}
    job.edit_shard("lm_head.weight", lambda tensors: tensors["lm_head.weight"].fill_(math.nan))
    job.output_dir = job.output_dir / "deeper" / "still"
    refuse(job, arctic_trt, FAILED, "lm_head.weight contains NaN")
    assert not job.output_dir.parent.exists()
    (job.model_dir / LAST_SHARD).write_bytes(good[LAST_SHARD] or b"")
    assert arctic_trt(*job.argv()).code == 0
    assert lasting(job.output_dir) == expected


def test_a_failure_keeps_json_mode_silent_on_stdout(job: Job, arctic_trt: ArcticTrt) -> None:
    job.edit_shard(EXPERT, lambda tensors: tensors[EXPERT].fill_(math.nan))
    done = arctic_trt(*job.argv("--json"))
    assert done.code == FAILED and done.out == ""
    assert [line for line in done.err.splitlines() if "error" in line] == [done.err.splitlines()[-1]]


def test_a_single_file_checkpoint_is_checked_alike(job: Job, arctic_trt: ArcticTrt) -> None:
    job.index.unlink()
    tensors = random_tensors(SMALL)
    del tensors[EXPERT]
    save_file(tensors, job.model_dir / "model.safetensors")
    refuse(job, arctic_trt, FAILED, job.model_dir, f"lacks tensor {EXPERT}.")

"""A whole run in this process: options in, result and files out, and a sentence for every option that does not fit."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arctic_trt.errors import ArcticTrtError, CheckpointError, RefusedError, UsageError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.runner import RunOptions, RunResult, run
from arctic_trt.runtime.sampler import Sampling
from tests.runtime.conftest import Model
from tests.support.engines import write_prompts


def finish(engine_dir: Path, **options: Any) -> RunResult:
    given = {} if "input_file" in options else {"input_text": ("the sea is",)}
    result = run(RunOptions(engine_dir=engine_dir, **{"max_output_len": 6, **given, **options}))
    assert result is not None
    return result


def test_a_result_has_what_the_interface_says(tiny: Model) -> None:
    result = finish(tiny.engine("fp8"), input_text=("the sea is", "a"))
    value = result.as_dict()
    assert list(value) == ["outputs", "seconds", "tokens_per_second", "world_size", "backend"]
    assert all(list(output) == ["text", "token_ids", "prompt_tokens", "finish_reason"] for output in value["outputs"])
    tokenizer = Tokenizer(tiny.hf_dir)
    assert [output["prompt_tokens"] for output in value["outputs"]] == [len(tokenizer.encode(t)) for t in ("the sea is", "a")]
    for output in value["outputs"]:
        assert output["text"] == tokenizer.decode(output["token_ids"]) and len(output["token_ids"]) == 6
    assert (value["world_size"], value["backend"]) == (1, "torch")
    assert value["tokens_per_second"] == pytest.approx(12 / value["seconds"], rel=0.01)
    assert json.loads(json.dumps(value)) == value


def test_the_engine_needs_neither_checkpoint_nor_tokenizer_beside_it(tiny: Model, tmp_path: Path) -> None:
    shutil.copytree(tiny.engine("fp8"), tmp_path / "engine")
    with_tokenizer = finish(tmp_path / "engine", tokenizer_dir=tiny.hf_dir)
    assert finish(tmp_path / "engine").outputs == with_tokenizer.outputs


def test_files_hold_prompts_and_outputs(tiny: Model, tmp_path: Path) -> None:
    prompts = tiny.prompts(7, 3)
    files = {f"output_{name}": tmp_path / f"out.{name}" for name in ("npy", "csv", "logits_npy")}
    result = finish(
        tiny.engine("fp8"), input_file=write_prompts(tmp_path / "in.npy", prompts), end_id=9, sampling=Sampling(), **files
    )
    rows = [[*prompt, *output.token_ids] for prompt, output in zip(prompts, result.outputs, strict=True)]
    padded = [row + [9] * (13 - len(row)) for row in rows]
    assert np.load(files["output_npy"]).tolist() == [[row] for row in padded]
    assert files["output_csv"].read_text().splitlines() == [",".join(map(str, row)) for row in padded]
    logits = np.load(files["output_logits_npy"])
    assert logits.shape == (2, 7, 512) and logits.dtype == np.float32
    assert [int(logits[0, 6].argmax()), int(logits[1, 2].argmax())] == [output.token_ids[0] for output in result.outputs]
    assert not logits[1, 3:].any()
    assert not list(tmp_path.glob("*.partial"))


def test_pieces_add_up_to_the_texts(tiny: Model) -> None:
    texts = {0: "", 1: ""}

    def add(index: int, piece: str) -> None:
        texts[index] += piece

    options = RunOptions(engine_dir=tiny.engine("fp8"), max_output_len=20, input_text=("the", "sea"), end_id=-1)
    result = run(options, add)
    assert result is not None and [output.text for output in result.outputs] == [texts[0], texts[1]]


def test_chat_is_rendered(tiny: Model, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "the sea"}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": messages}))
    chat = finish(tiny.engine("fp8"), input_text=("the sea",), chat=True)
    assert chat.outputs == finish(tiny.engine("fp8"), input_file=tmp_path / "in.jsonl").outputs
    assert chat.outputs[0].prompt_tokens == len(Tokenizer(tiny.hf_dir).encode_chat(messages, reply=True))


def test_ids_need_no_tokenizer(tiny: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = tmp_path / "engine"
    shutil.copytree(tiny.engine("fp8"), bare, ignore=shutil.ignore_patterns("token*", "generation*"))
    prompts = write_prompts(tmp_path / "in.npy", tiny.prompts(5))
    with caplog.at_level(logging.WARNING, "arctic_trt"):
        result = finish(bare, input_file=prompts)
    assert result.outputs[0].text == "" and len(result.outputs[0].token_ids) == 6
    assert "no tokenizer.json" in caplog.text
    with pytest.raises(UsageError, match=r"tokenizer\.json does not exist"):
        finish(bare)
    with pytest.raises(UsageError, match=r"tokenizer\.json does not exist"):
        finish(bare, input_file=prompts, stop_words=("a",))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tokenizer_dir": Path("/absent")}, "--tokenizer_dir /absent is not a directory"),
        ({"input_text": ("",)}, "--input_text 0 is empty"),
        ({"input_text": ("a" * 300,)}, "Prompt 0 has"),
        ({"max_output_len": 255}, "exceeds the engine's --max_seq_len 256"),
        ({"max_output_len": 0}, "--max_output_len 0"),
        ({"output_npy": Path("/absent/o.npy")}, "--output_npy /absent/o.npy: the directory /absent does not exist"),
    ],
)
def test_options_that_do_not_fit(tiny: Model, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        finish(tiny.engine("fp8"), **options)
    assert complaint in str(caught.value)


def test_an_engine_of_tensorrt_llm_is_refused(tiny: Model, tmp_path: Path) -> None:
    shutil.copytree(tiny.engine("fp8"), tmp_path / "engine")
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    del config["backend"]
    (tmp_path / "engine" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match="is a TensorRT-LLM engine, but tensorrt_llm is not installed"):
        finish(tmp_path / "engine")


def test_several_ranks_need_mpirun(tiny: Model) -> None:
    with pytest.raises(RefusedError, match=r"needs 2 ranks .*mpirun -n 2"):
        finish(tiny.engine("tiny-tp2", tp_size=2))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.unlink(), "does not exist, so the engine is not complete. Build the engine again"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is truncated"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b"layers.1.router", b"layers.1.rooter")),
            "lacks tensor|unexpected",
        ),
    ],
)
def test_a_damaged_rank_file_is_named(tiny: Model, tmp_path: Path, damage: Any, complaint: str) -> None:
    shutil.copytree(tiny.engine("fp8"), tmp_path / "engine")
    damage(tmp_path / "engine" / "rank0.safetensors")
    with pytest.raises(CheckpointError, match=rf"rank0\.safetensors.*({complaint})"):
        finish(tmp_path / "engine")


def test_a_failing_run_leaves_no_files(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from arctic_trt.runtime import backends

    def fail(*args: object, **options: object) -> None:
        raise ArcticTrtError("halfway")

    monkeypatch.setattr(backends, "generate", fail)
    with pytest.raises(ArcticTrtError, match="halfway"):
        finish(tiny.engine("fp8"), output_logits_npy=tmp_path / "l.npy", output_npy=tmp_path / "o.npy")
    assert list(tmp_path.iterdir()) == []

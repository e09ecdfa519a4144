"""The tiny Arctic from checkpoint to text through the public interface: what it says, and how much FP8 costs it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from arctic_trt.cli.main import run_cli
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.runner import RunOptions, run

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tests" / "data" / "tiny-arctic"
HELD_OUT_TOKENS = 384


def quantize(output_dir: Path, *flags: str) -> Path:
    words = ["quantize", "--model_dir", str(MODEL), "--output_dir", str(output_dir), "--tp_size", "1", "-q", *flags]
    assert run_cli(words) == 0
    return output_dir


def build(checkpoint: Path, output_dir: Path) -> Path:
    assert (
        run_cli(["build", "--checkpoint_dir", str(checkpoint), "--output_dir", str(output_dir), "--backend", "torch", "-q"]) == 0
    )
    return output_dir


def held_out_prompts(path: Path) -> np.ndarray:
    """Token ids of the held-out texts, rows padded with -1."""
    tokenizer = Tokenizer(MODEL)
    texts = [json.loads(line) for line in (ROOT / "calib" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [tokenizer.encode(item["text"])[:HELD_OUT_TOKENS] for item in texts if "text" in item][:16]
    prompts = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, ids in zip(prompts, rows, strict=True):
        row[: len(ids)] = ids
    np.save(path, prompts)
    return prompts


def perplexity(engine: Path, work: Path) -> float:
    """Of the engine's own prompt logits."""
    prompts = held_out_prompts(work / "prompts.npy")
    logits_file = work / f"{engine.name}.npy"
    run(RunOptions(engine_dir=engine, max_output_len=1, input_file=work / "prompts.npy", output_logits_npy=logits_file))
    logits = torch.from_numpy(np.load(logits_file))
    loss = count = 0.0
    for row, ids in zip(logits, torch.from_numpy(prompts).long(), strict=True):
        ids = ids[ids >= 0]
        loss += F.cross_entropy(row[: len(ids) - 1], ids[1:], reduction="sum").item()
        count += len(ids) - 1
    return math.exp(loss / count)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def fp8_checkpoint(work: Path) -> Path:
    return quantize(work / "fp8")


@pytest.fixture(scope="module")
def fp8_engine(work: Path, fp8_checkpoint: Path) -> Path:
    return build(fp8_checkpoint, work / "fp8-engine")


@pytest.fixture(scope="module")
def fp8_perplexity(work: Path, fp8_engine: Path) -> float:
    return perplexity(fp8_engine, work)


def test_fp8_costs_less_than_two_percent(work: Path, fp8_perplexity: float) -> None:
    bf16 = perplexity(build(quantize(work / "bf16", "--qformat", "full_prec"), work / "bf16-engine"), work)
    assert bf16 < 6
    assert abs(fp8_perplexity / bf16 - 1) < 0.02


@pytest.mark.parametrize("name", ["mlp.proj.activation_scaling_factor", "attention.qkv.weights_scaling_factor"])
def test_a_scale_eight_times_too_small_shows(work: Path, fp8_checkpoint: Path, fp8_perplexity: float, name: str) -> None:
    broken = work / f"broken-{name}"
    broken.mkdir()
    tensors = load_file(fp8_checkpoint / "rank0.safetensors")
    for layer in (0, 1):
        tensors[f"transformer.layers.{layer}.{name}"] /= 8
    save_file(tensors, broken / "rank0.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (broken / file).write_bytes((fp8_checkpoint / file).read_bytes())
    assert perplexity(build(broken, work / f"{broken.name}-engine"), work) > fp8_perplexity * 1.02


@pytest.mark.parametrize("prompt", ["The future of AI is", "SELECT region, SUM(amount)", "Snowflake Arctic is"])
def test_it_speaks(fp8_engine: Path, prompt: str) -> None:
    result = run(RunOptions(engine_dir=fp8_engine, max_output_len=40, input_text=(prompt,)))
    assert result is not None
    text = result.outputs[0].text
    known = set(re.findall(r"[A-Za-z]+", (ROOT / "calib" / "default.jsonl").read_text(encoding="utf-8")))
    words = re.findall(r"[A-Za-z]+", text)[:-1]  # the last one may have been cut short
    assert len(words) >= 8
    assert sum(word in known for word in words) >= 0.9 * len(words), text


def test_it_answers_in_a_chat(fp8_engine: Path) -> None:
    result = run(RunOptions(engine_dir=fp8_engine, max_output_len=60, input_text=("What is a mixture of experts?",), chat=True))
    assert result is not None
    assert "expert" in result.outputs[0].text


def evaluate(checkpoint: Path, data: Path | str, *flags: str) -> dict[str, Any]:
    words = ["eval", str(checkpoint), "--data", str(data), "--max_seq_length", str(HELD_OUT_TOKENS), "--no_report", "-q", *flags]
    assert run_cli(words) == 0
    report: dict[str, Any] = json.loads((checkpoint / "report" / "eval.json").read_text())
    return report


def test_the_evaluation_of_a_checkpoint_is_that_of_its_engine(work: Path, fp8_checkpoint: Path, fp8_perplexity: float) -> None:
    ids = [row[row >= 0].tolist() for row in held_out_prompts(work / "prompts.npy")]
    data = work / "heldout-ids.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    assert evaluate(fp8_checkpoint, data)["perplexity"] == pytest.approx(fp8_perplexity, rel=1e-3)


def test_the_harness_finds_the_likelihoods_of_the_evaluation(work: Path, fp8_checkpoint: Path, fp8_engine: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance  # type: ignore[import-not-found]

    from arctic_trt.runtime.harness import ArcticTrtLM

    texts = ["The future of AI is open. When the weights are open, everyone can learn from them.", "SELECT region, SUM(amount)"]
    lm = ArcticTrtLM(str(fp8_engine))
    try:
        asked = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)]
        found = lm.loglikelihood_rolling(asked, True)
    finally:
        ArcticTrtLM.engines.close()
    for text, likelihood in zip(texts, found, strict=True):
        data = work / "text.jsonl"
        data.write_text(json.dumps({"text": text}) + "\n")
        report = evaluate(fp8_checkpoint, data)
        assert likelihood == pytest.approx(-report["nll"] * report["data"]["predicted_tokens"], rel=4e-3), "bf16 has 8 bits"


def test_a_tenth_more_bytes_halve_what_fp8_costs(work: Path, fp8_checkpoint: Path) -> None:
    samples = ["--against", str(MODEL), "--num_samples", "8"]
    before = evaluate(fp8_checkpoint, "heldout", *samples, "--sensitivity", "--size_budget", "10%")
    recipe = before["sensitivity"]["recipe"]
    after = evaluate(quantize(work / "mixed", "--config", recipe), "heldout", *samples)
    sizes = [(work / name / "rank0.safetensors").stat().st_size for name in ("fp8", "mixed")]
    assert sizes[1] <= 1.1 * sizes[0]
    assert after["kl_mean"] < 0.5 * before["kl_mean"]
    assert after["kl_mean"] == pytest.approx(before["sensitivity"]["predicted_kl"], rel=0.5), "as was foretold"

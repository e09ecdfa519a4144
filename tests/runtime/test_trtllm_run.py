"""``arctic-trt run`` on a TensorRT engine under mpirun, where a stand-in plays TensorRT-LLM: calls, outputs, refusals."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.requests import word_ids
from tests.runtime.conftest import Model
from tests.support.engines import Job, mpi_environ, mpirun_command, write_prompts
from tests.trtllm_standin.fixtures import StandIn, install_standin

Go = Callable[..., Job]
PROMPT = "the sea is"

OFFICIAL_FROM_DIR = {
    "lora_dir": None,
    "debug_mode": False,
    "lora_ckpt_source": "hf",
    "gpu_weights_percent": 1,
    "max_output_len": 20,
    "enable_context_fmha_fp32_acc": False,
    "fail_fast_on_attention_window_too_large": False,
    "is_enc_dec": False,
    "max_batch_size": 1,
    "max_beam_width": 1,
    "max_attention_window_size": None,
    "sink_token_length": None,
    "max_tokens_in_paged_kv_cache": None,
    "kv_cache_enable_block_reuse": False,
    "kv_cache_free_gpu_memory_fraction": 0.9,
    "cross_kv_cache_fraction": None,
    "enable_chunked_context": False,
    "multi_block_mode": True,
    "cuda_graph_mode": False,
    "gather_generation_logits": False,
    "use_variable_beam_width_search": False,
}
"""What ``examples/run.py`` passes for the official recipe's third command, rank and directory apart."""
OFFICIAL_GENERATE = {
    "encoder_input_ids": None,
    "encoder_input_features": None,
    "encoder_output_lengths": None,
    "max_new_tokens": 20,
    "temperature": 1.0,
    "top_k": 1,
    "top_p": 0.0,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_p": 0.0,
    "num_return_sequences": None,
    "bad_words_list": None,
    "output_cum_log_probs": False,
    "output_log_probs": False,
    "random_seed": 0,
    "lora_uids": None,
    "prompt_table": None,
    "prompt_tasks": None,
    "streaming": False,
    "output_sequence_lengths": True,
    "output_generation_logits": False,
    "return_dict": True,
    "return_all_generated_tokens": False,
    "input_token_extra_ids": None,
    "language_adapter_uids": None,
}
"""The same for ``generate``. What it passes besides are the defaults of the C++ sampler: no penalties, no n-gram limits."""


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return install_standin(tmp_path_factory.mktemp("standin"))


@pytest.fixture(scope="module")
def make_engine(tiny: Model, standin: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[Any, ...], Path] = {}

    def build(*flags: str, tp_size: int = 1, pp_size: int = 1) -> Path:
        key = (*flags, tp_size, pp_size)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("engine") / "engine"
            checkpoint = tiny.checkpoint(f"trtllm-{tp_size}-{pp_size}", tp_size=tp_size, pp_size=pp_size)
            words = ["--checkpoint_dir", checkpoint, "--output_dir", made[key], "--timing_cache_dir", made[key].parent, *flags]
            arctic_trt("build", "--backend", "tensorrt_llm", *words, standin=standin)
        return made[key]

    return build


def arctic_trt(*words: object, standin: StandIn) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "arctic_trt", *map(str, words)], env=standin.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def go(standin: StandIn, tmp_path: Path) -> Go:
    def run(engine: Path, *words: object, ranks: int | None = None, **environ: str) -> Job:
        """As many ranks as the engine has, unless told otherwise."""
        log = Path(standin.changes["TRTLLM_STANDIN_LOG"])
        log.unlink(missing_ok=True)
        command = ["-m", "arctic_trt", "run", "--engine_dir", engine, "--max_output_len", 20, *words]
        world = ranks or world_size(engine)
        done = subprocess.run(
            mpirun_command(world, *command) if world > 1 else [sys.executable, *map(str, command)],
            env=mpi_environ(**{**standin.changes, **environ}),
            capture_output=True,
            timeout=120,
            check=False,
        )
        return Job(done.returncode, *(stream.decode(errors="replace") for stream in (done.stdout, done.stderr)))

    return run


def world_size(engine: Path) -> int:
    return int(json.loads((engine / "config.json").read_text())["pretrained_config"]["mapping"]["world_size"])


def outputs(job: Job) -> list[dict[str, Any]]:
    assert job.code == 0, job.err
    value: dict[str, Any] = json.loads(job.out)
    assert value["backend"] == "tensorrt_llm"
    found: list[dict[str, Any]] = value["outputs"]
    return found


def played(prompt: list[int], vocab: int, count: int) -> list[int]:
    """What the stand-in generates greedily after ``prompt``, by the rule in its ``runtime/decoding.py``."""
    ids = list(prompt)
    for _ in range(count):
        ids.append((7 * ids[-1] + len(ids) + 3) % vocab)
    return ids[len(prompt) :]


def test_the_official_command(go: Go, make_engine: Callable[..., Path], standin: StandIn, tiny: Model) -> None:
    engine = make_engine(tp_size=2)
    job = go(engine, "--tokenizer_dir", tiny.hf_dir, "--input_text", PROMPT)
    assert job.code == 0, job.err
    assert f'Input [Text 0]: "{PROMPT}"' in job.out and "Output [Text 0]: " in job.out
    opened = standin.calls("ModelRunnerCpp.from_dir")
    assert sorted(call["rank"] for call in opened) == [0, 1]
    ids = Tokenizer(tiny.hf_dir).encode(PROMPT)
    for call in opened:
        arguments = call["arguments"]
        assert {key: arguments[key] for key in OFFICIAL_FROM_DIR} == OFFICIAL_FROM_DIR
        assert (arguments["engine_dir"], arguments["max_input_len"]) == (str(engine), len(ids))
    [asked] = [call for call in standin.calls("ModelRunnerCpp.generate") if call["rank"] == 0]
    arguments = asked["arguments"]
    assert {key: arguments[key] for key in OFFICIAL_GENERATE} == OFFICIAL_GENERATE
    assert arguments["batch_input_ids"] == [ids]
    assert arguments["end_id"] == arguments["pad_id"] == Tokenizer(tiny.hf_dir).hf.eos_token_id


def test_stdout_is_one_object_of_the_torch_backends_form_whatever_the_library_prints(
    go: Go, make_engine: Callable[..., Path], tiny: Model
) -> None:
    job = go(make_engine(), "--input_text", PROMPT, "--json", "--streaming")
    [output] = outputs(job)
    torch_job = go(tiny.engine("fp8"), "--input_text", PROMPT, "--json")
    ours, theirs = json.loads(job.out), json.loads(torch_job.out)
    assert list(ours) == list(theirs) and list(ours["outputs"][0]) == list(theirs["outputs"][0])
    assert (ours["world_size"], theirs["backend"]) == (1, "torch")
    assert "[TensorRT-LLM]" in job.err and "TensorRT-LLM" not in job.out
    assert len(output["token_ids"]) == 20 and output["finish_reason"] == "length"
    assert "Output [Text 0]: " in job.err


def test_the_tokens_are_those_of_the_engine(go: Go, make_engine: Callable[..., Path], tiny: Model, tmp_path: Path) -> None:
    prompts = tiny.prompts(5, 3, 7)
    words = ["--input_file", write_prompts(tmp_path / "in.npy", prompts), "--end_id", -1, "--json"]
    files = ["--output_npy", tmp_path / "out.npy", "--output_csv", tmp_path / "out.csv"]
    found = outputs(go(make_engine("--max_batch_size", "2"), *words, *files))
    expected = [played(prompt, 512, 20) for prompt in prompts]
    assert [output["token_ids"] for output in found] == expected
    assert [output["prompt_tokens"] for output in found] == [5, 3, 7]
    rows = np.load(tmp_path / "out.npy")
    assert rows.shape == (3, 1, 27) and rows[2, 0].tolist() == prompts[2] + expected[2]
    assert (tmp_path / "out.csv").read_text().count("\n") == 3


def test_streamed_or_not_the_outputs_are_equal(go: Go, make_engine: Callable[..., Path], tiny: Model) -> None:
    prompt = Tokenizer(tiny.hf_dir).encode(PROMPT)
    words = ["--input_text", PROMPT, "a", "--json", "--end_id", played(prompt, 512, 20)[9]]
    at_once, streamed = outputs(go(make_engine(), *words)), outputs(go(make_engine(), *words, "--streaming"))
    assert at_once == streamed
    assert at_once[0]["finish_reason"] == "stop" and len(at_once[0]["token_ids"]) == 10


def test_prompt_logits_of_unequal_prompts(go: Go, make_engine: Callable[..., Path], tiny: Model, tmp_path: Path) -> None:
    """The library cuts those of a batch at wrong rows; one by one they are right."""
    prompts = tiny.prompts(6, 2)
    engine = make_engine("--gather_context_logits")
    logits = [tmp_path / f"logits{index}.npy" for index in range(3)]
    words = ["--json", "--end_id", -1]
    outputs(go(engine, "--input_file", write_prompts(tmp_path / "all.npy", prompts), *words, "--output_logits_npy", logits[2]))
    for index, prompt in enumerate(prompts):
        alone = write_prompts(tmp_path / f"{index}.npy", [prompt])
        outputs(go(engine, "--input_file", alone, *words, "--output_logits_npy", logits[index]))
    together = np.load(logits[2])
    assert together.shape == (2, 6, 512) and together.dtype == np.float32
    for index, prompt in enumerate(prompts):
        assert np.array_equal(together[index, : len(prompt)], np.load(logits[index])[0])
        assert not together[index, len(prompt) :].any()


def test_settings_reach_the_runtime(go: Go, make_engine: Callable[..., Path], standin: StandIn) -> None:
    words = ["--kv_cache_free_gpu_memory_fraction", 0.5, "--kv_cache_enable_block_reuse", "--enable_chunked_context"]
    more = ["--max_tokens_in_paged_kv_cache", 999, "--cuda_graph_mode", "--temperature", 0.7, "--top_p", 0.9, "--random_seed", 3]
    job = go(make_engine(), "--input_text", PROMPT, "--json", "--kv_cache_memory", "1GiB", *words, *more)
    outputs(job)
    assert "--kv_cache_memory: without effect" in job.err, "a budget of the torch backend"
    opened = standin.calls("ModelRunnerCpp.from_dir")[0]["arguments"]
    assert (opened["kv_cache_free_gpu_memory_fraction"], opened["max_tokens_in_paged_kv_cache"]) == (0.5, 999)
    assert opened["kv_cache_enable_block_reuse"] and opened["enable_chunked_context"] and opened["cuda_graph_mode"]
    asked = standin.calls("ModelRunnerCpp.generate")[0]["arguments"]
    assert (asked["temperature"], asked["top_k"], asked["top_p"], asked["random_seed"]) == (0.7, 0, 0.9, 3)


def test_sampling_reaches_the_library(
    go: Go, make_engine: Callable[..., Path], standin: StandIn, tiny: Model, tmp_path: Path
) -> None:
    flags = ["--min_p", 0.1, "--presence_penalty", 0.5, "--frequency_penalty", 0.25, "--bad_words", "sea", "--temperature", 2]
    words = ["--input_text", PROMPT, "a", "--num_return_sequences", 2, "--end_id", -1, "--output_npy", tmp_path / "o.npy"]
    found = outputs(go(make_engine("--max_batch_size", "4"), *words, *flags, "--json"))
    asked = standin.calls("ModelRunnerCpp.generate")[0]["arguments"]
    assert (asked["min_p"], asked["presence_penalty"], asked["frequency_penalty"]) == (0.1, 0.5, 0.25)
    lengths = [len(Tokenizer(tiny.hf_dir).encode(text)) for text in (PROMPT, "a")]
    assert (asked["num_return_sequences"], asked["prompt_ignore_length"]) == (2, max(lengths))
    assert asked["bad_words_list"] == [[list(ids) for ids in word_ids(["sea"], Tokenizer(tiny.hf_dir))]] * 2
    assert [output["prompt_tokens"] for output in found] == [lengths[0]] * 2 + [lengths[1]] * 2
    assert found[0]["token_ids"] != found[1]["token_ids"]
    assert np.load(tmp_path / "o.npy")[1, 0, lengths[1] : lengths[1] + 20].tolist() == found[2]["token_ids"]


def test_the_torch_backend_says_what_it_has_no_settings_for(go: Go, tiny: Model) -> None:
    words = ["--enable_chunked_context", "--cuda_graph_mode", "--max_tokens_in_paged_kv_cache", 640]
    job = go(tiny.engine("fp8"), "--input_text", PROMPT, *words, "-v")
    assert job.code == 0
    assert "--cuda_graph_mode: without effect, the torch backend has no such settings" in job.err
    assert "--enable_chunked_context: the torch backend always does that" in job.err
    assert "room for 640 tokens" in job.err and "found in the KV cache" in job.err


@pytest.mark.parametrize(
    ("ranks", "words", "environ", "code", "complaint"),
    [
        (2, [], {"FAKE_GPUS": "1"}, 3, r"2 ranks were started on this machine, which shows 1 GPUs"),
        (1, [], {"FAKE_GPU_CAPABILITY": "8.9"}, 3, r"built for SM 90 .*GPU 0 is SM 89"),
        (1, [], {"FAKE_GPU_FREE_MIB": "0"}, 3, r"GPU 0 .* has 0\.0 GB free"),
        (2, ["--output_logits_npy", "x.npy"], {}, 2, "--output_logits_npy needs the prompts' logits.*--gather_context_logits"),
        (1, ["--logprobs", "2"], {}, 2, "--logprobs needs an engine of the torch backend"),
        (1, ["--kv_cache_free_gpu_memory_fraction", "2"], {}, 2, "--kv_cache_free_gpu_memory_fraction 2.0 is out of range"),
    ],
)
def test_refusals_before_loading(
    go: Go,
    make_engine: Callable[..., Path],
    standin: StandIn,
    ranks: int,
    words: list[str],
    environ: dict[str, str],
    code: int,
    complaint: str,
) -> None:
    job = go(make_engine(tp_size=ranks), "--input_text", PROMPT, *words, **environ)
    assert job.code == code and re.search(complaint, job.err), job.err
    assert job.err.count("arctic-trt: error:") == 1
    assert standin.calls("ModelRunnerCpp.from_dir") == []


def test_the_number_of_ranks(go: Go, make_engine: Callable[..., Path]) -> None:
    job = go(make_engine(tp_size=2), "--input_text", PROMPT, ranks=3)
    assert job.code == 3 and "This engine needs 2 ranks (tp 2 x pp 1), got 3" in job.err


def test_a_pipeline(go: Go, make_engine: Callable[..., Path], tiny: Model) -> None:
    [output] = outputs(go(make_engine(tp_size=1, pp_size=2), "--input_text", PROMPT, "--json", "--end_id", -1))
    assert output["token_ids"] == played(Tokenizer(tiny.hf_dir).encode(PROMPT), 512, 20)


def test_another_version_is_refused(make_engine: Callable[..., Path], go: Go, tmp_path: Path) -> None:
    engine = make_engine()
    other = install_standin(tmp_path / "other", "1.1.0")
    job = go(engine, "--input_text", PROMPT, **other.changes)
    assert job.code == 3
    assert "was built with TensorRT-LLM 1.2.1, 1.1.0 is installed. Install tensorrt-llm==1.2.1" in job.err


def test_an_engine_that_lost_a_rank(make_engine: Callable[..., Path], go: Go, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(make_engine(tp_size=2), tmp_path / "engine"))
    (engine / "rank1.engine").write_bytes(b"")
    job = go(engine, "--input_text", PROMPT)
    assert job.code == 1 and re.search(r"rank1\.engine has 0 bytes, expected \d+", job.err)

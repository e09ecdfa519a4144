"""The stand-in for TensorRT-LLM: it has what the real one has, lacks what that lacks, and tells what was called."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import mpi_environ, mpirun_command
from tests.trtllm_standin.fixtures import StandIn
from tests.trtllm_standin.frozen import BUILD, FLAGS, FROM_DIR, GENERATE, ONLY_BEFORE_1_2

Install = Callable[..., StandIn]
VERSIONS = ("1.0.0", "1.1.0", "1.2.1")
VOCAB, POSITIONS = 97, 64


def shown(function: Any) -> str:
    """A signature without annotations and without the instance."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values() if p.name not in ("self", "cls")]
    return str(inspect.Signature(bare))[1:-1]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    def write(tp_size: int = 1, pp_size: int = 1, **fields: Any) -> Path:
        directory = tmp_path / f"checkpoint-{tp_size}-{pp_size}"
        directory.mkdir()
        mapping = {"world_size": tp_size * pp_size, "tp_size": tp_size, "pp_size": pp_size}
        config = {"architecture": "ArcticForCausalLM", "dtype": "bfloat16", "vocab_size": VOCAB, "mapping": mapping}
        text = json.dumps({**config, "max_position_embeddings": POSITIONS, "quantization": {"quant_algo": "FP8"}, **fields})
        (directory / "config.json").write_text(text)
        for rank in range(tp_size * pp_size):
            (directory / f"rank{rank}.safetensors").touch()
        return directory

    return write


def build(standin: StandIn, checkpoint_dir: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    """``trtllm-build`` into ``engine`` next to the stand-in."""
    command = [sys.executable, "-m", "tensorrt_llm.commands.build", "--checkpoint_dir", checkpoint_dir, *flags]
    words = [str(word) for word in (*command, "--output_dir", standin.directory / "engine")]
    return subprocess.run(words, env=standin.env, cwd=standin.directory, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def runner(trtllm_standin: Install, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A runner of an engine for one GPU, built with ``flags``."""

    def open_engine(*flags: object, **from_dir: Any) -> Any:
        standin = trtllm_standin()
        assert build(standin, checkpoint(), "--max_batch_size", 4, *flags).returncode == 0
        standin.enter(monkeypatch)
        runner_cls: Any = import_module("tensorrt_llm.runtime").ModelRunnerCpp
        return runner_cls.from_dir(str(standin.directory / "engine"), **from_dir)

    return open_engine


def ids(*tokens: int) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int32)


@pytest.mark.parametrize("version", VERSIONS)
def test_flags_defaults_and_choices_are_the_real_ones(
    version: str, trtllm_standin: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    trtllm_standin(version).enter(monkeypatch)
    parser = import_module("tensorrt_llm.commands.build").parse_arguments()
    found = {action.dest: (action.default, " ".join(action.choices or ())) for action in parser._actions}
    for special in ("help", "kv_cache_type", "paged_kv_cache", "lora_target_modules"):
        found.pop(special)
    clusters = found.pop("cluster_key", None)
    expected = FLAGS | (ONLY_BEFORE_1_2 if version < "1.2" else {})
    assert {name: repr(known) for name, known in found.items()} == {name: repr(known) for name, known in expected.items()}
    assert (clusters is not None) == (version < "1.2")
    assert not {"kv_cache_type", "paged_kv_cache"} & set(vars(parser.parse_args([])))


@pytest.mark.parametrize("version", VERSIONS)
def test_signatures_are_the_real_ones(version: str, trtllm_standin: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    trtllm_standin(version).enter(monkeypatch)
    commands, runner_cls = import_module("tensorrt_llm.commands.build"), import_module("tensorrt_llm.runtime").ModelRunnerCpp
    assert {name: shown(getattr(commands, name)) for name in BUILD} == BUILD
    assert (shown(runner_cls.from_dir), shown(runner_cls.generate)) == (FROM_DIR, GENERATE)


@pytest.mark.parametrize(
    ("version", "flags", "message"),
    [
        ("1.2.1", ["--auto_parallel", 2], "unrecognized arguments: --auto_parallel"),
        ("1.0.0", ["--max_output_len", 20], "unrecognized arguments: --max_output_len"),
        ("1.1.0", ["--gemm_plugin", "int8"], "invalid choice: 'int8'"),
        ("1.2.1", ["--kv_cache_type", "ring"], "invalid KVCacheType value"),
    ],
)
def test_a_command_line_that_the_version_does_not_know_is_refused(
    version: str, flags: list[object], message: str, trtllm_standin: Install, checkpoint: Callable[..., Path]
) -> None:
    done = build(trtllm_standin(version), checkpoint(), *flags)
    assert (done.returncode, message in done.stderr) == (2, True)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_engine_has_the_real_shape(version: str, trtllm_standin: Install, checkpoint: Callable[..., Path]) -> None:
    standin = trtllm_standin(version)
    done = build(standin, checkpoint(2), "--gemm_plugin", "bfloat16", "--workers", 8)
    assert done.returncode == 0, done.stderr
    engine = standin.directory / "engine"
    assert sorted(path.name for path in engine.iterdir()) == ["config.json", "rank0.engine", "rank1.engine"]
    config = json.loads((engine / "config.json").read_text())
    assert list(config) == ["version", "pretrained_config", "build_config"]
    assert (config["version"], config["pretrained_config"]["mapping"]["world_size"]) == (version, 2)
    built = config["build_config"]
    assert built["kv_cache_type"] == ("PAGED" if version < "1.2" else "paged")
    assert ("auto_parallel_config" in built, "dry_run" in built) == (version < "1.2", False)
    assert (built["max_seq_len"], built["max_input_len"]) == (POSITIONS, POSITIONS)
    assert built["plugin_config"]["gemm_plugin"] == built["plugin_config"]["dtype"] == "bfloat16"
    assert (standin.directory / "model.cache").exists()


def test_calls_are_recorded_with_rank_and_process(trtllm_standin: Install, checkpoint: Callable[..., Path]) -> None:
    standin = trtllm_standin(gpus=2)
    build(standin, checkpoint(4), "--workers", 8)
    (parallel,) = standin.calls("parallel_build")
    assert parallel["arguments"]["workers"] == 2
    saved = standin.calls("build_and_save")
    assert sorted((call["rank"], call["arguments"]["gpu_id"]) for call in saved) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert parallel["pid"] not in {call["pid"] for call in saved}


def test_faults_strike_the_rank_that_they_are_meant_for(trtllm_standin: Install, checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint(2)
    failing, dying = trtllm_standin(fail_rank=1), trtllm_standin(die_rank=1)
    failed = build(failing, directory)
    assert (failed.returncode, "building rank 1 failed" in failed.stderr, "[E]" in failed.stdout) == (1, True, True)
    assert (failing.directory / "engine" / "rank0.engine").exists()
    assert build(dying, directory).returncode == -9


def test_generation_follows_its_rule_and_pads_with_the_end_token(runner: Callable[..., Any]) -> None:
    outputs = runner().generate(
        [ids(5, 6), ids(9)], max_new_tokens=3, end_id=-1, pad_id=0, top_k=1, return_dict=True, output_sequence_lengths=True
    )
    first = [5, 6, 47, (7 * 47 + 6) % VOCAB]
    first.append((7 * first[-1] + 7) % VOCAB)
    assert outputs["output_ids"].shape == (2, 1, POSITIONS)
    assert outputs["output_ids"][0, 0].tolist() == first + [-1] * (POSITIONS - 5)
    assert outputs["sequence_lengths"].tolist() == [[5], [4]]
    assert set(outputs) == {"output_ids", "sequence_lengths"}


def test_the_end_token_is_left_out_and_a_stop_word_is_not(runner: Callable[..., Any]) -> None:
    opened = runner()
    asked = {"max_new_tokens": 3, "return_dict": True, "output_sequence_lengths": True}
    lengths = [
        opened.generate([ids(5, 6)], end_id=47, **asked)["sequence_lengths"].item(),
        opened.generate([ids(5, 6)], end_id=-1, stop_words_list=[[[47]]], **asked)["sequence_lengths"].item(),
        opened.generate([ids(5, 6)], end_id=-1, bad_words_list=[[[47]]], **asked)["output_ids"][0, 0, 2].item(),
    ]
    assert lengths == [2, 3, 48]


def test_a_stream_is_cumulative_and_ends_as_the_whole_does(runner: Callable[..., Any]) -> None:
    opened = runner(max_input_len=4, max_output_len=6)
    asked: dict[str, Any] = {"max_new_tokens": 6, "end_id": 1, "return_dict": True, "output_sequence_lengths": True}
    pieces = list(opened.generate([ids(5, 6)], streaming=True, top_p=0.9, temperature=0.7, random_seed=3, **asked))
    whole = opened.generate([ids(5, 6)], top_p=0.9, temperature=0.7, random_seed=3, **asked)
    assert [piece["sequence_lengths"].item() for piece in pieces] == list(range(3, 3 + len(pieces)))
    assert torch.equal(pieces[-1]["output_ids"], whole["output_ids"])
    assert whole["output_ids"].shape == (1, 1, 10)


def test_prompt_logits_are_a_list_and_only_there_if_gathered(runner: Callable[..., Any]) -> None:
    opened = runner("--gather_context_logits")
    outputs = opened.generate([ids(5, 6), ids(7, 8)], end_id=-1, return_dict=True, output_generation_logits=True)
    assert [logits.shape for logits in outputs["context_logits"]] == [(2, VOCAB)] * 2
    assert outputs["context_logits"][0].argmax(-1).tolist() == [39, 47]
    assert outputs["generation_logits"].shape == (2, 1, 1, VOCAB)


@pytest.mark.parametrize(
    ("from_dir", "keywords", "error", "message"),
    [
        ({"max_output_len": POSITIONS}, {}, AssertionError, ""),
        ({"max_batch_size": 5}, {}, AssertionError, ""),
        ({"max_num_tokens": 5}, {}, TypeError, "max_num_tokens"),
        ({}, {"max_tokens": 5}, TypeError, "max_tokens"),
        ({}, {"top_p": 1.5}, RuntimeError, "top_p = 1.5"),
        ({"max_input_len": 1}, {}, RuntimeError, r"Maximum input length \(2\) exceeds the engine or specified limit \(1\)"),
        ({}, {"max_new_tokens": 63}, RuntimeError, r"maximum new tokens \(63\) exceeds"),
        ({"rank": 1}, {}, AssertionError, ""),
    ],
)
def test_what_the_real_runner_refuses_is_refused(
    from_dir: dict[str, Any], keywords: dict[str, Any], error: type[Exception], message: str, runner: Callable[..., Any]
) -> None:
    with pytest.raises(error, match=message or None):
        runner(**from_dir).generate([ids(5, 6)], **{"end_id": -1, **keywords})


@pytest.mark.mpi
def test_under_mpi_rank_0_alone_gets_an_answer(trtllm_standin: Install, checkpoint: Callable[..., Path]) -> None:
    standin = trtllm_standin()
    assert build(standin, checkpoint(2)).returncode == 0
    program = (
        "import torch, tensorrt_llm; from tensorrt_llm.runtime import ModelRunnerCpp; rank = tensorrt_llm.mpi_rank(); "
        "r = ModelRunnerCpp.from_dir('engine', rank=rank); print(rank, len(r.generate([torch.tensor([1])], end_id=-1)))"
    )
    job: dict[str, Any] = {"cwd": standin.directory, "capture_output": True, "text": True, "timeout": 100}
    done = subprocess.run(mpirun_command(2, "-c", program), env=mpi_environ(**standin.changes), check=False, **job)
    assert sorted(line for line in done.stdout.splitlines() if line[0].isdigit()) == ["0 1", "1 0"], done.stderr
    alone = subprocess.run([sys.executable, "-c", program], env=standin.env, check=False, **job)
    assert "MPI size 1 != TP size 2 * PP size 1 * CP Size 1" in alone.stderr


def test_the_machine_shows_what_the_test_asked_for(trtllm_standin: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    from arctic_trt.machine import package_version, query_gpus, query_links

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    trtllm_standin("1.1.0", gpus=4, free_mib=70000).enter(monkeypatch)
    assert (package_version("tensorrt_llm"), package_version("tensorrt")) == ("1.1.0", "10.13.3")
    gpus = query_gpus()
    assert [(gpu.index, gpu.name, gpu.sm, gpu.free_bytes >> 20, gpu.driver) for gpu in gpus] == [
        (index, "NVIDIA H100 80GB HBM3", 90, 70000, "580.95.05") for index in range(4)
    ]
    assert query_links() == "NV18 between all 4"

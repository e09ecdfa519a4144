"""``arctic-trt build --backend tensorrt_llm`` from the command line, where a stand-in plays TensorRT-LLM."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.cli.build_trtllm import HEARTBEAT_S, Progress, rank_line, summary_line
from arctic_trt.engine.tensorrt_llm.build import RankState
from arctic_trt.output import Output
from tests.conftest import Finished
from tests.support.jobs import quantize, tree
from tests.trtllm_standin.fixtures import StandIn

Run = Callable[..., Finished]
LIMITS_OF_OURS = {"max_batch_size", "max_input_len", "max_seq_len"}
"""What Arctic's defaults make explicit, and the official recipe leaves to TensorRT-LLM (2048, 1024 and the model's)."""
OF_THE_PROCESS = {"output_dir", "input_timing_cache", "output_timing_cache", "ckpt_dir"}


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tiny_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trtllm") / "checkpoint"
    quantize(tiny_model, directory, calib_dataset=str(tiny_samples), tp_size=8)
    return directory


@pytest.fixture
def standin(trtllm_standin: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., StandIn]:
    def install(version: str = "1.2.1", **machine: Any) -> StandIn:
        made = trtllm_standin(version, **machine)
        made.enter(monkeypatch)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return made

    return install


def build(arctic_trt: Run, checkpoint: Path, engine: Path, *words: object) -> Finished:
    return arctic_trt("build", "--checkpoint_dir", checkpoint, "--output_dir", engine, *words)


def by_rank(calls: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Every argument with which a rank was built, as one flat dict, without what is a matter of directories."""
    found: dict[int, dict[str, Any]] = {}
    for call in calls:
        if call["call"] in ("build_and_save", "build_model"):
            found.setdefault(call["rank"], {}).update(flat(call["arguments"]))
    return {rank: {key: value for key, value in of.items() if key not in OF_THE_PROCESS} for rank, of in found.items()}


def flat(arguments: dict[str, Any]) -> dict[str, Any]:
    inner = [flat(value) for value in arguments.values() if isinstance(value, dict)]
    outer = {key: value for key, value in arguments.items() if not isinstance(value, dict)}
    return {key: value for part in (outer, *inner) for key, value in part.items()}


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0", "1.2.1"])
@pytest.mark.parametrize(
    "words",
    [
        ["--gpt_attention_plugin", "bfloat16", "--gemm_plugin", "bfloat16"],
        ["--gemm_plugin", "disable", "--moe_plugin", "disable"],
        ["--gpt_attention_plugin", "bfloat16", "--gemm_plugin", "bfloat16", "--use_fp8_context_fmha", "enable"],
    ],
    ids=["official", "OOTB", "fp8 attention"],
)
def test_the_calls_are_those_of_trtllm_build(
    words: list[str], version: str, standin: Callable[..., StandIn], checkpoint: Path, tmp_path: Path, arctic_trt: Run
) -> None:
    ours = standin(version)
    done = build(arctic_trt, checkpoint, tmp_path / "engine", *words, "--workers", 8, "--backend", "tensorrt_llm")
    assert done.code == 0, done.err
    attention = [] if "--gpt_attention_plugin" in words else ["--gpt_attention_plugin", "bfloat16"]
    theirs = official_build(ours, checkpoint, tmp_path, [*words, *attention])
    for rank in range(8):
        found, expected = by_rank(ours.calls())[rank], theirs[rank]
        differing = {key for key in {*found, *expected} if found.get(key) != expected.get(key)}
        assert differing <= LIMITS_OF_OURS, {key: (found.get(key), expected.get(key)) for key in differing}
        assert found["max_batch_size"] == 256 and expected["max_batch_size"] == 2048


def official_build(standin: StandIn, checkpoint: Path, tmp_path: Path, words: list[str]) -> dict[int, dict[str, Any]]:
    """What ``trtllm-build`` itself does with the official recipe's second command."""
    log = tmp_path / "official.jsonl"
    arguments = ["--checkpoint_dir", str(checkpoint), "--output_dir", str(tmp_path / "official"), *words, "--workers", "8"]
    program = "import sys; from tensorrt_llm.commands.build import main; sys.exit(main())"
    subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**standin.env, "TRTLLM_STANDIN_LOG": str(log)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    return by_rank([json.loads(line) for line in log.read_text().splitlines()])


def test_progress_and_result(standin: Callable[..., StandIn], checkpoint: Path, tmp_path: Path, arctic_trt: Run) -> None:
    standin()
    done = build(arctic_trt, checkpoint, tmp_path / "engine", "--workers", 4, "--json")
    value = json.loads(done.out)
    assert (value["backend"], value["world_size"], value["workers"], value["complete"]) == ("tensorrt_llm", 8, 4, True)
    assert value["bytes_written"] == sum(path.stat().st_size for path in (tmp_path / "engine").glob("rank*.engine"))
    for rank in range(8):
        for status in ("queued", "building", "saved"):
            assert f"rank {rank} of 8  {status}" in done.err
    again = build(arctic_trt, checkpoint, tmp_path / "engine", "--workers", 4)
    assert again.code == 0 and "already holds exactly this engine; nothing to do" in again.err


def test_a_build_is_one_process(checkpoint: Path, tmp_path: Path, arctic_trt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arctic_trt.launch.time.sleep", lambda seconds: None)
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "1")
    assert build(arctic_trt, checkpoint, tmp_path / "engine", "--dry_run").code == 0
    monkeypatch.setenv("PMI_SIZE", "8")
    done = build(arctic_trt, checkpoint, tmp_path / "engine")
    assert done.code == 3 and "build was started as 8 processes" in done.err and not (tmp_path / "engine").exists()


def test_a_part_says_that_it_is_one(standin: Callable[..., StandIn], checkpoint: Path, tmp_path: Path, arctic_trt: Run) -> None:
    standin()
    first = build(arctic_trt, checkpoint, tmp_path / "engine", "--ranks", "0-3", "--json")
    run = arctic_trt("run", "--engine_dir", tmp_path / "engine", "--max_output_len", 1, "--input_text", "x")
    assert run.code == 2 and "engine is not complete. Run the command that builds it again" in run.err
    assert json.loads(first.out)["complete"] is False and "becomes an engine when all 8 ranks are built" in first.err
    second = build(arctic_trt, checkpoint, tmp_path / "engine", "--ranks", "4-7")
    assert "Built" in second.out and (tmp_path / "engine" / "config.json").is_file()


def test_a_failing_rank(standin: Callable[..., StandIn], checkpoint: Path, tmp_path: Path, arctic_trt: Run) -> None:
    standin(fail_rank=2)
    done = build(arctic_trt, checkpoint, tmp_path / "engine", "--workers", 2)
    assert done.code == 1 and done.err.count("arctic-trt: error:") == 1
    error = done.err[done.err.index("arctic-trt: error:") :]
    assert "Rank 2 (checkpoint/rank2.safetensors) was not built" in error and "logs/rank2.log" in error
    assert "rank 2 of 8  failed" in done.err


@pytest.mark.parametrize(
    ("machine", "words", "code", "complaint"),
    [
        ({"gpus": 0}, [], 3, "this machine shows none"),
        ({"capability": "8.0", "gpu_name": "NVIDIA A100"}, [], 3, "NVIDIA A100 (SM 80) has no FP8 tensor cores"),
        ({}, ["--cluster_key", "H100-SXM"], 2, "--cluster_key was removed in TensorRT-LLM 1.2"),
        ({}, ["--reduce_fusion", "enable"], 2, "--reduce_fusion enable does not fit Arctic"),
        ({}, ["--ranks", "8"], 2, "--ranks '8' does not fit a checkpoint of 8 ranks, 0 to 7"),
        ({}, ["--max_seq_len", "8192"], 2, "--max_seq_len 8192 exceeds max_position_embeddings"),
        ({}, ["--gemm_plugin", "bf16"], 2, "Invalid value for '--gemm_plugin'"),
    ],
)
def test_refusals(
    machine: dict[str, Any],
    words: list[str],
    code: int,
    complaint: str,
    standin: Callable[..., StandIn],
    checkpoint: Path,
    tmp_path: Path,
    arctic_trt: Run,
) -> None:
    installed = standin(**machine)
    done = build(arctic_trt, checkpoint, tmp_path / "engine", "--backend", "tensorrt_llm", *words)
    assert (done.code, done.out) == (code, "") and complaint in done.err
    assert not (tmp_path / "engine").exists() and installed.calls() == []


def test_without_the_library_one_sentence_says_what_is_missing(checkpoint: Path, tmp_path: Path, arctic_trt: Run) -> None:
    done = build(arctic_trt, checkpoint, tmp_path / "engine", "--backend", "tensorrt_llm")
    assert done.code == 3 and done.err.count("\n") == 1
    assert "needs the package tensorrt_llm, which is not installed. Install it on a CUDA machine" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_without_the_library(checkpoint: Path, tmp_path: Path, arctic_trt: Run) -> None:
    words = ["--backend", "tensorrt_llm", "--dry_run"]
    done = build(arctic_trt, checkpoint, tmp_path / "engine", *words)
    assert done.code == 0 and list(tmp_path.iterdir()) == []
    assert "TensorRT-LLM is not installed here: flags are checked against 1.2.1" in done.err
    [line] = [line for line in done.out.splitlines() if line.startswith("  trtllm-build ")]
    value = json.loads(build(arctic_trt, checkpoint, tmp_path / "engine", *words, "--json").out)
    assert shlex.split(line) == value["command"]
    assert sum("-m arctic_trt.engine.tensorrt_llm.worker" in line for line in done.out.splitlines()) == 8


def test_the_commands_of_a_dry_run_are_those_that_run(
    standin: Callable[..., StandIn], checkpoint: Path, tmp_path: Path, arctic_trt: Run
) -> None:
    """Typed by hand, a printed command builds its rank."""
    installed = standin()
    value = json.loads(build(arctic_trt, checkpoint, tmp_path / "engine", "--dry_run", "--json").out)
    before = tree(tmp_path / "engine")
    words = value["rank_commands"][5]
    output = Path(words[words.index("--output_dir") + 1])
    output.mkdir(parents=True)
    subprocess.run(words, env=installed.env, check=True, capture_output=True)
    assert before is None and (output / "rank5.engine").is_file()


def test_the_torch_backend_names_what_it_ignores(checkpoint: Path, tmp_path: Path, arctic_trt: Run) -> None:
    done = build(arctic_trt, checkpoint, tmp_path / "engine", "--backend", "torch", "--tokens_per_block", 64, "--ranks", "0-3")
    assert done.code == 0 and "without effect: --tokens_per_block, --ranks" in done.err


@pytest.mark.parametrize(
    ("state", "line"),
    [
        (RankState(3), "rank 3 of 8  queued"),
        (RankState(3, "building", gpu=1, log=Path("e/logs/rank3.log")), "rank 3 of 8  building  on GPU 1, log e/logs/rank3.log"),
        (RankState(3, "saved", seconds=1330, num_bytes=60_100_000_000), "rank 3 of 8  saved  60.10 GB in 22 min 10 s"),
        (RankState(3, "kept", num_bytes=5000), "rank 3 of 8  kept  5.00 kB, built before from the same inputs"),
        (RankState(3, "elsewhere"), "rank 3 of 8  elsewhere  another process is building it"),
    ],
)
def test_lines_about_ranks(state: RankState, line: str) -> None:
    assert rank_line(state, 8) == line


def test_all_ranks_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    states = [RankState(0, "saved"), RankState(1, "building", began=30.0), RankState(2), RankState(3)]
    assert summary_line(states) == "1 saved, 2 queued, building: rank 1 (1 min 10 s)"
    assert summary_line([RankState(0, "kept")]) == "1 kept"


def test_a_log_gets_a_line_for_each_change_and_one_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    state = RankState(0)
    with Progress(Output(), 1) as progress:
        progress.update([state])
        progress.update([state])
        state.status, state.gpu, state.log = "building", 0, Path("log")
        progress.update([state])
        now[0] = HEARTBEAT_S + 1
        progress.update([state])
        progress.update([state])
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["rank 0 of 1  queued", "rank 0 of 1  building  on GPU 0, log log", "building: rank 0 (1 min 01 s)"]

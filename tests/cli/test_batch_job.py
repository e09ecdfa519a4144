"""Batch jobs from the command line, alone and under mpirun."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from arctic_trt.cli import batch_job
from arctic_trt.cli.batch_job import JobProgress, progress_line
from arctic_trt.output import Output
from arctic_trt.runtime.jobs.job import Meter
from tests.conftest import Finished
from tests.support.batch_jobs import mixed_lines, read_results, write_lines
from tests.support.engines import ROOT, mpi_environ, mpirun, mpirun_command

ArcticTrt = Callable[..., Finished]
LINES = [
    {"custom_id": "text", "prompt": "the sea is", "max_tokens": 4},
    {"custom_id": "default", "prompt": [9, 8, 7]},
    {
        "custom_id": "chat",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": "the sea"}], "max_tokens": 3, "temperature": 1, "n": 2},
    },
    {"custom_id": "text", "prompt": "again"},
    "nonsense",
]


@pytest.fixture
def words(engines: Callable[[int], Path], tmp_path: Path) -> list[object]:
    lines = write_lines(tmp_path / "in.jsonl", LINES)
    output = tmp_path / "out.jsonl"
    return ["run", "--engine_dir", engines(1), "--input_file", lines, "--output_file", output, "--end_id", -1]


def test_a_job(words: list[object], arctic_trt: ArcticTrt, tmp_path: Path) -> None:
    done = arctic_trt(*words, "--max_output_len", 2, "--json")
    value = json.loads(done.out)
    assert done.code == 0 and done.out.count("\n") == 1, done.err
    names = ("lines", "completed", "errors", "skipped_done", "prompt_tokens", "output_tokens", "world_size")
    results = read_results(tmp_path / "out.jsonl")
    prompts = sum(each["response"]["body"]["usage"]["prompt_tokens"] for each in results.values() if each["response"])
    assert [value[name] for name in names] == [5, 3, 2, 0, prompts, 12, 1]
    assert value["seconds"] > 0 and value["tokens_per_second"] > 0
    assert [results[f"batch_req_{number}"]["custom_id"] for number in range(1, 6)] == [
        "text",
        "default",
        "chat",
        "text",
        "line-5",
    ]
    assert len(results["batch_req_2"]["response"]["body"]["choices"][0]["token_ids"]) == 2
    assert len(results["batch_req_3"]["response"]["body"]["choices"]) == 2
    assert [results[f"batch_req_{number}"]["error"]["code"] for number in (4, 5)] == ["duplicate_custom_id", "invalid_json"]
    done = arctic_trt(*words, "--max_output_len", 2)
    assert done.code == 0 and re.search(r"lines +5\n +completed +0\n +errors +0\n +done before +5\n", done.out)


def test_not_one_line_done_is_a_failure(words: list[object], arctic_trt: ArcticTrt, tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", ["nonsense"])
    for _ in range(2):
        done = arctic_trt(*words, "--json")
        assert done.code == 1 and json.loads(done.out)["lines"] == 1
        assert re.search(r"Not one of the 1 lines of .*in\.jsonl could be done\. .*out\.jsonl says why, line by line\.", done.err)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--streaming"], "--streaming does not go with --output_file, which makes this a batch job"),
        (["--input_text", "a"], "--input_text does not go with --output_file"),
        (["--output_npy", "x.npy"], "--output_npy does not go with --output_file"),
        (["--output_csv", "x.csv"], "--output_csv does not go with --output_file"),
        (["--output_logits_npy", "x.npy"], "--output_logits_npy does not go with --output_file"),
        (["--num_return_sequences", "2"], "--num_return_sequences does not go with --output_file"),
        (["--logprobs", "0"], "--logprobs does not go with --output_file"),
        (["--cuda_graph_mode"], "--cuda_graph_mode does not go with --output_file"),
        (["--shard", "2/2"], "--shard 2/2 is not valid, expected I/N with 0 <= I < N"),
        (["--input_file", "x.txt"], "--input_file x.txt has the ending '.txt', expected .jsonl"),
        (["--top_p", "2"], "--top_p 2.0 is out of range"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], complaint: str, words: list[object], arctic_trt: ArcticTrt) -> None:
    done = arctic_trt(*words, *flags)
    assert (done.code, done.out) == (2, "") and complaint in done.err and done.err.count("\n") == 1


def test_flags_of_jobs_without_a_job(engines: Callable[[int], Path], arctic_trt: ArcticTrt) -> None:
    words = ["run", "--engine_dir", engines(1), "--input_text", "a"]
    done = arctic_trt(*words)
    assert done.code == 2 and "--max_output_len is required" in done.err
    done = arctic_trt(*words, "--max_output_len", 1, "--shard", "0/2")
    assert done.code == 2 and "--shard is for batch jobs. Give --output_file" in done.err
    done = arctic_trt("run", "--engine_dir", engines(1), "--output_file", "out.jsonl")
    assert done.code == 2 and "--output_file needs an --input_file" in done.err


def test_a_tensorrt_engine_is_refused(
    words: list[object], arctic_trt: ArcticTrt, engines: Callable[[int], Path], tmp_path: Path
) -> None:
    config = json.loads((engines(1) / "config.json").read_text())
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "config.json").write_text(json.dumps({**config, "backend": "tensorrt_llm"}))
    done = arctic_trt(*words, "--engine_dir", tmp_path / "engine")
    assert done.code == 3 and "is a TensorRT-LLM engine" in done.err and not (tmp_path / "out.jsonl").exists()


def test_progress_in_a_log_comes_every_few_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    times: Iterator[float] = iter((0.0, 4.0, 5.5, 7.0, 11.0))
    monkeypatch.setattr(batch_job.time, "monotonic", lambda: next(times))
    meter = Meter(lines=10, skipped_done=2, began=time.perf_counter() - 4, completed=3, tokens_seen=80)
    with JobProgress(Output()) as progress:
        for _ in range(4):
            progress(meter)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and re.fullmatch(r"lines 5/10  (20\.0|19\.\d) tokens/s  eta 6\.\d s", lines[0])


def test_the_line_of_progress() -> None:
    meter = Meter(lines=10, skipped_done=2, errors=1, began=time.perf_counter())
    assert progress_line(meter).startswith("lines 3/10  errors 1  0.0 tokens/s  eta ")
    assert progress_line(Meter(lines=10, skipped_done=2)) == "lines 2/10  0.0 tokens/s  eta unknown"


def test_on_a_terminal_one_line_is_redrawn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Output, "terminal", property(lambda output: True))
    monkeypatch.setenv("FORCE_COLOR", "1")
    with JobProgress(Output()) as progress:
        progress(Meter(lines=10, skipped_done=2))
        time.sleep(0.2)
    assert "lines 2/10" in capsys.readouterr().err


@pytest.mark.mpi
def test_a_job_of_two_ranks_that_is_refused_ends_with_one_sentence(
    words: list[object], engines: Callable[[int], Path], tmp_path: Path
) -> None:
    (tmp_path / "out.jsonl").write_text("somebody's\n")
    job = mpirun(2, "-m", "arctic_trt", *words, "--engine_dir", engines(2))
    assert (job.code, job.out) == (3, "")
    assert job.err.count("arctic-trt: error:") == 1 and "does not say which job's it is" in job.err
    assert (tmp_path / "out.jsonl").read_text() == "somebody's\n"


@pytest.mark.mpi
def test_two_ranks_that_are_interrupted_and_go_on_do_what_one_does(
    words: list[object], engines: Callable[[int], Path], arctic_trt: ArcticTrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCTIC_TRT_CPU_KERNELS", "portable")  # equal for any number of ranks, and slow enough to interrupt
    write_lines(tmp_path / "in.jsonl", [*LINES, *mixed_lines(295, 512)])
    words += ["--max_output_len", 2, "--json"]
    assert arctic_trt(*words).code == 0
    output = tmp_path / "together.jsonl"
    words += ["--engine_dir", engines(2), "--output_file", output]
    with subprocess.Popen(
        mpirun_command(2, "-m", "arctic_trt", *words), cwd=ROOT, env=mpi_environ(), stdout=subprocess.DEVNULL
    ) as job:
        until = time.monotonic() + 30
        while not (output.exists() and output.stat().st_size) and time.monotonic() < until:
            time.sleep(0.005)
        job.send_signal(signal.SIGTERM)
    done = output.read_bytes()
    assert job.returncode != 0 and 1 <= done.count(b"\n") < 300
    finished = mpirun(2, "-m", "arctic_trt", *words)
    assert finished.code == 0, finished.err
    value = json.loads(finished.out)
    assert value["world_size"] == 2 and value["skipped_done"] == done.count(b"\n")
    assert output.read_bytes().startswith(done[: done.rfind(b"\n") + 1])
    alone, together = read_results(tmp_path / "out.jsonl"), read_results(output)
    for each in (*alone.values(), *together.values()):
        (each["response"] or {"body": {}})["body"].pop("model", None)
    assert together == alone


def test_a_job_keeps_to_the_cache_it_is_given(words: list[object], arctic_trt: ArcticTrt, tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [{"custom_id": "a", "prompt": [5] * 40}, {"custom_id": "b", "prompt": [5] * 9}])
    flags = ["--max_output_len", 2, "--max_tokens_in_paged_kv_cache", 32, "--kv_cache_memory", "1GiB", "-v"]
    done = arctic_trt(*words, *flags)
    assert done.code == 0 and "room for 32 tokens" in done.err
    first, second = (read_results(tmp_path / "out.jsonl")[f"batch_req_{number}"] for number in (1, 2))
    assert "exceeds the KV cache of 32 tokens" in first["error"]["message"] and second["response"]

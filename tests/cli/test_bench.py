"""``arctic-trt bench`` from the command line: on the tiny engine, alone and under mpirun, and on servers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from arctic_trt.report import measure
from tests.conftest import Finished
from tests.support.engines import mpirun
from tests.support.fake_llm_server import fake_llm_server
from tests.support.small_tokenizer import write_tokenizer

BATCH_KEYS = {
    *("num_prompts", "input_tokens", "output_tokens", "latency_s", "ttft_s"),
    *("prefill_tokens_per_s", "decode_tokens_per_s", "total_tokens_per_s"),
}


@pytest.fixture(autouse=True)
def short_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LEAST_STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(measure, "last_level_cache", lambda: 0)


@pytest.fixture
def batch(engines: Callable[[int], Path]) -> list[object]:
    return ["bench", "batch", "--engine_dir", engines(1), "-n", "1,2", "-l", 16, "--max_new_tokens", 4]


@pytest.fixture
def online(engines: Callable[[int], Path]) -> list[object]:
    return ["bench", "online", "--engine_dir", engines(1), "-qps", "50,100", "-l", 16, "-k", 4, "--num_requests", 5]


def test_batches_as_json(batch: list[object], engines: Callable[[int], Path], arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt(*batch, "--tokenizer_dir", engines(1), "--warmup", "--json")
    assert done.code == 0 and done.out.count("\n") == 1
    value = json.loads(done.out)
    assert {"rows", "bandwidth_gb_s", "bytes_per_token", "roofline_share"} <= value.keys()
    assert all(row.keys() >= BATCH_KEYS for row in value["rows"])
    assert [(row["num_prompts"], row["input_tokens"], row["output_tokens"]) for row in value["rows"]] == [(1, 16, 4), (2, 16, 4)]
    for row in value["rows"]:
        assert 0 < row["ttft_s"] < row["latency_s"]
        assert row["total_tokens_per_s"] == pytest.approx(row["num_prompts"] * 20 / row["latency_s"])
    rate = value["rows"][0]["decode_tokens_per_s"]
    assert value["roofline_share"] == pytest.approx(value["bytes_per_token"] * rate / (1e9 * value["bandwidth_gb_s"]))
    said = [line for line in done.err.splitlines() if not line.startswith("INFO")]
    assert said == ["measuring 1 prompt of 16 tokens", "measuring 2 prompts of 16 tokens"]


def test_batches_for_people_and_spreadsheets(batch: list[object], arctic_trt: Callable[..., Finished], tmp_path: Path) -> None:
    done = arctic_trt(*batch, "--repeat", 2, "-q", "--csv", tmp_path / "b.csv", "--plot", tmp_path / "b.png", "-tp", 1)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Batches\n  prompts  input  output  latency s") and "\nMemory\n  read bandwidth  " in done.out
    with (tmp_path / "b.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == [
        *("framework", "num_prompts", "avg_input", "max_input", "min_input", "avg_output", "max_output", "min_output"),
        *("latency(s)", "throughput", "throughput_output", "tensor_parallel"),
    ]
    assert (first["framework"], second["num_prompts"], second["avg_input"], first["max_output"]) == ("arctic-trt", "2", "16", "4")
    assert Image.open(tmp_path / "b.png").size == (1600, 800)


def test_requests_at_random_times(online: list[object], arctic_trt: Callable[..., Finished], tmp_path: Path) -> None:
    files = ["--csv", tmp_path / "o.csv", "--plot", tmp_path / "o.svg"]
    done = arctic_trt(*online, "-c", 2, "--json", "--warmup", 2, *files)
    assert done.code == 0
    value = json.loads(done.out)
    assert [(row["qps"], row["num_requests"], row["failed"]) for row in value["rows"]] == [(50, 5, 0), (100, 5, 0)]
    for row in value["rows"]:
        assert row["latency_s"]["p50"] > row["ttft_s"]["p50"] > 0 and row["itl_s"]["p99"] >= row["itl_s"]["p50"] > 0
    with (tmp_path / "o.csv").open(newline="") as file:
        assert [row["qps"] for row in csv.DictReader(file)] == ["50.0", "100.0"]
    assert (tmp_path / "o.svg").read_text().startswith("<?xml")
    assert value["concurrency"] == 2
    people = arctic_trt(*online)
    assert people.code == 0 and people.out.startswith("Requests at random times\n  qps  input  done  failed")


@pytest.mark.parametrize("kind", ["triton", "openai"])
def test_servers(kind: str, arctic_trt: Callable[..., Finished], tmp_path: Path) -> None:
    words = ["--model", "arctic", "--tokenizer_dir", write_tokenizer(tmp_path), "-l", 9, "-k", 3, "--json"]
    with fake_llm_server(delay_s=0.002) as server:
        target = [f"--{kind}-url", server.url]
        (row,) = json.loads((done := arctic_trt("bench", "batch", *target, *words, "-n", 3)).out)["rows"]
        assert done.code == 0 and (row["num_prompts"], row["input_tokens"], row["output_tokens"]) == (3, 9, 3)
        server.faults.extend([None, "500"])
        done = arctic_trt("bench", "online", *target, *words, "-qps", 100, "--num_requests", 4)
        assert done.code == 0 and json.loads(done.out)["rows"][0]["failed"] == 1
        assert f"WARNING: 1 of 4 requests failed; the first: {server.url}" in done.err
        server.faults.append("cut")
        done = arctic_trt("bench", "batch", *target, *words, "-n", 2)
        assert (done.code, done.out) == (1, "") and "1 of 2 requests failed, the first because: " in done.err
    done = arctic_trt("bench", "online", *target, *words, "-qps", 100, "--num_requests", 2)
    assert (done.code, done.out) == (1, "") and "2 of 2 requests failed" in done.err and "Connection refused" in done.err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["-n", "1,zero"], "'1,zero' is not a list of positive numbers separated by commas"),
        (["-n", "0"], "'0' is not a list of positive numbers"),
        (["-l", "16.5"], "'16.5' is not a list of positive numbers"),
        (["--max_new_tokens", "0"], "--max_new_tokens"),
        (["--triton_url", "http://localhost:1"], "--engine_dir and --triton_url are given"),
        (["--plot", "picture.pdf"], "--plot picture.pdf has the ending '.pdf'"),
        (["--csv", "absent/b.csv"], "--csv absent/b.csv: the directory absent does not exist"),
        (["-l", "5000"], "A prompt has 5000 tokens"),
        (["-qps", "1"], "No such option"),
    ],
)
def test_wrong_usage(flags: list[str], complaint: str, batch: list[object], arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt(*batch, *flags)
    assert (done.code, done.out) == (2, "") and complaint in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("words", [["-qps", "-1"], ["-qps", "inf"], ["-qps", "nan"], ["--queries_per_second", ""]])
def test_wrong_rates(words: list[str], online: list[object], arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt(*online, *words)
    assert (done.code, done.out) == (2, "") and "is not a list of positive numbers" in done.err


def test_bench_alone_shows_its_commands(arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt("bench")
    assert done.code == 2 and "batch   Prompts that come all at once." in done.err
    assert "No such command 'latency'" in arctic_trt("bench", "latency").err


@pytest.mark.mpi
def test_two_ranks(engines: Callable[[int], Path]) -> None:
    words = ["--engine_dir", engines(2), "-qps", 50, "--num_requests", 4, "-l", 16, "-k", 4, "--json"]
    job = mpirun(2, "-m", "arctic_trt", "bench", "online", *words)
    assert job.code == 0, job.err
    value = json.loads(job.out)
    assert value["tensor_parallel"] == 2 and value["rows"][0]["output_tokens"] == 4

"""Whole jobs in this process: each line once, whatever happened before, and never more of the input in memory than is needed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.errors import ArcticTrtError, RefusedError, UsageError
from arctic_trt.runtime.batcher import Batcher
from arctic_trt.runtime.jobs import job as module
from arctic_trt.runtime.jobs.input_file import Shard
from arctic_trt.runtime.jobs.job import JobOptions, JobResult, Meter, run_job
from arctic_trt.runtime.jobs.output_file import record_path
from arctic_trt.runtime.runner import RunOptions, run
from tests.runtime.conftest import Model
from tests.support.batch_jobs import mixed_lines, read_results, write_lines
from tests.support.engines import build_engine

NUM_LINES = 40


@pytest.fixture(scope="module")
def engine(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of batches so small that lines have to wait."""
    return build_engine(tiny.checkpoint("fp8"), tmp_path_factory.mktemp("jobs") / "engine", max_batch_size=3, max_seq_len=64)


@pytest.fixture
def options(engine: Path, tmp_path: Path) -> JobOptions:
    lines = write_lines(tmp_path / "in.jsonl", mixed_lines(NUM_LINES, 512))
    return JobOptions(engine_dir=engine, input_file=lines, output_file=tmp_path / "out.jsonl", sampling={"seed": 5})


def do(options: JobOptions) -> JobResult:
    result = run_job(options)
    assert result is not None
    return result


def counts(result: JobResult) -> tuple[int, int, int, int]:
    meter = result.meter
    assert meter.done == meter.lines
    return meter.lines, meter.completed, meter.errors, meter.skipped_done


def test_every_line_has_one_result(options: JobOptions) -> None:
    result = do(options)
    assert counts(result) == (40, 34, 6, 0) and not result.hopeless
    results = read_results(options.output_file)
    assert {value["custom_id"] for value in results.values()} == {f"r{index}" for index in range(NUM_LINES)}
    usages = [value["response"]["body"]["usage"] for value in results.values() if value["response"]]
    assert result.meter.prompt_tokens == sum(usage["prompt_tokens"] for usage in usages)
    assert result.meter.output_tokens == sum(usage["completion_tokens"] for usage in usages)
    value = result.as_dict()
    assert value["tokens_per_second"] == pytest.approx(value["output_tokens"] / value["seconds"], rel=1e-3)
    before = options.output_file.read_bytes()
    assert counts(do(options)) == (40, 0, 0, 40) and options.output_file.read_bytes() == before


def test_results_are_those_of_a_plain_run(options: JobOptions, tmp_path: Path) -> None:
    do(options)
    lines = [line for line in mixed_lines(NUM_LINES, 512) if "n" not in line]
    results = {value["custom_id"]: value for value in read_results(options.output_file).values()}
    for line in lines[:6]:
        assert isinstance(line, dict)
        if results[line["custom_id"]]["error"]:
            continue
        prompt = write_lines(tmp_path / "one.jsonl", [{"input_ids": line["prompt"]}])
        alone = run(RunOptions(engine_dir=options.engine_dir, input_file=prompt, max_output_len=line["max_tokens"]))
        (choice,) = results[line["custom_id"]]["response"]["body"]["choices"]
        assert alone is not None and choice["token_ids"] == alone.outputs[0].token_ids and choice["text"] == alone.outputs[0].text


def test_an_output_cut_anywhere_is_completed_to_the_same_results(options: JobOptions) -> None:
    do(options)
    whole, expected = options.output_file.read_bytes(), read_results(options.output_file)
    for length in range(1, len(whole), len(whole) // 4):
        options.output_file.write_bytes(whole[:length])
        result = do(options)
        assert result.meter.skipped_done == whole[:length].count(b"\n")
        assert options.output_file.read_bytes().startswith(whole[: whole[:length].rfind(b"\n") + 1])
        assert read_results(options.output_file) == expected


def test_shards_are_the_whole(options: JobOptions, tmp_path: Path) -> None:
    do(options)
    expected, together = read_results(options.output_file), {}
    for index in range(3):
        part = replace(options, shard=Shard(index, 3), output_file=tmp_path / f"out{index}.jsonl")
        assert sum(counts(do(part))) == 2 * len(range(index, NUM_LINES, 3))
        together |= read_results(part.output_file)
    assert together == expected
    other = replace(options, shard=Shard(1, 3), output_file=tmp_path / "out0.jsonl")
    with pytest.raises(RefusedError, match=r"out0\.jsonl belongs to a job that differs in shard \(0/3 then, 1/3 now\)"):
        do(other)
    assert counts(do(replace(options, shard=Shard(99, 100), output_file=tmp_path / "none.jsonl"))) == (0, 0, 0, 0)


def test_an_input_may_grow(options: JobOptions) -> None:
    do(options)
    with options.input_file.open("a") as file:
        file.write('{"custom_id": "new", "prompt": [7], "max_tokens": 2}\n{"custom_id": "r0", "prompt": [7]}\n')
    assert counts(do(options)) == (42, 1, 1, 40)
    results = read_results(options.output_file)
    assert results["batch_req_41"]["custom_id"] == "new"
    assert results["batch_req_42"]["error"] == {
        "code": "duplicate_custom_id",
        "message": "custom_id 'r0' is that of input line 1 already.",
    }
    assert counts(do(options)) == (42, 0, 0, 42)
    write_lines(options.input_file, mixed_lines(NUM_LINES, 512, seed=2))
    with pytest.raises(RefusedError, match=r"belongs to another input: .*in\.jsonl does not begin with the 42 lines"):
        do(options)


def test_a_line_that_is_taken_out_of_the_output_is_done_again(options: JobOptions) -> None:
    do(options)
    lines, expected = options.output_file.read_text().splitlines(keepends=True), read_results(options.output_file)
    options.output_file.write_text("".join(lines[:10] + lines[11:]))
    assert do(options).meter.skipped_done == 39 and read_results(options.output_file) == expected


def test_other_settings_are_refused(options: JobOptions) -> None:
    do(options)
    before = options.output_file.read_bytes()
    for changed, name in [
        (replace(options, sampling={"seed": 6}), r"seed \(5 then, 6 now\)"),
        (replace(options, max_output_len=3), r"max_output_len \(None then, 3 now\)"),
        (replace(options, end_id=-1), "end_ids"),
        (replace(options, stop_words=("x",)), "stop_words"),
        (replace(options, chat=True), "chat"),
    ]:
        with pytest.raises(RefusedError, match=f"belongs to a job that differs in {name}"):
            do(changed)
    record_path(options.output_file).unlink()
    with pytest.raises(RefusedError, match="does not say which job's it is"):
        do(options)
    assert options.output_file.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"input_file": Path("in.txt")}, r"--input_file in\.txt has the ending '\.txt', expected \.jsonl"),
        ({"input_file": Path("absent.jsonl")}, r"--input_file absent\.jsonl cannot be read"),
        ({"output_file": Path("absent/out.jsonl")}, r"--output_file absent/out\.jsonl: the directory absent does not exist"),
        ({"max_output_len": 0}, "--max_output_len 0 is not a positive number"),
        ({"sampling": {"temperature": -1}}, "--temperature -1 is out of range"),
        ({"tokenizer_dir": Path("absent")}, "--tokenizer_dir absent is not a directory"),
    ],
)
def test_wrong_usage(changes: dict[str, Any], complaint: str, options: JobOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_engine", None)  # nothing may be loaded before
    with pytest.raises(UsageError, match=complaint):
        run_job(replace(options, **changes))


def test_not_one_line_that_can_be_done(options: JobOptions) -> None:
    write_lines(options.input_file, ["nonsense", "", "more of it"])
    for skipped in (0, 2):
        result = do(options)
        assert result.hopeless and result.meter.skipped_done == skipped
    write_lines(options.input_file, [])
    assert not do(replace(options, output_file=options.output_file.with_name("empty.jsonl"))).hopeless


def test_only_as_many_lines_as_are_needed_are_under_way(options: JobOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way: list[int] = []
    step = Batcher.step

    def counted(batcher: Batcher) -> None:
        under_way.append(len(batcher._writers))
        step(batcher)

    monkeypatch.setattr(Batcher, "step", counted)
    do(options)
    assert 9 <= max(under_way) <= 10, "three batches of three, and a line of two choices"
    assert min(under_way[: len(under_way) // 2]) >= 9, "nothing waits for a slot that is free"


def test_texts_without_a_tokenizer_are_error_lines(options: JobOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "nothing").mkdir()
    write_lines(options.input_file, [{"prompt": "text"}, {"prompt": [1], "max_tokens": 1}])
    result = do(replace(options, tokenizer_dir=tmp_path / "nothing"))
    assert counts(result) == (2, 1, 1, 0) and "only prompts of token ids can be done" in caplog.text
    assert "needs a tokenizer" in read_results(options.output_file)["batch_req_1"]["error"]["message"]


def test_a_full_disk_ends_the_job_in_a_sentence_and_the_same_command_goes_on(
    options: JobOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    do(options)
    expected, original, room = read_results(options.output_file), os.write, [0]
    record_path(options.output_file).unlink()
    options.output_file.unlink()

    def write(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= (written := original(descriptor, data[: room[0]]))
        return written

    done = []
    for _ in range(4):
        room[0] = 2000
        with monkeypatch.context() as patch, pytest.raises(ArcticTrtError, match=r"out\.jsonl cannot be written: No space left"):
            patch.setattr(os, "write", write)
            do(options)
        done.append(options.output_file.read_bytes().count(b"\n"))
    assert done == sorted(set(done)) and done[0] > 0
    assert do(options).meter.skipped_done == done[-1]
    assert read_results(options.output_file) == expected


def test_a_request_that_the_cache_can_never_hold_is_an_error_line(options: JobOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Batcher.add

    def picky(batcher: Batcher, request: Any) -> None:
        if request.index == 0:
            raise UsageError("Prompt 0 needs more than --kv_cache_memory.")
        add(batcher, request)

    monkeypatch.setattr(Batcher, "add", picky)
    assert counts(do(options)) == (40, 33, 7, 0)
    assert "needs more than --kv_cache_memory" in read_results(options.output_file)["batch_req_1"]["error"]["message"]


def test_the_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    times: Iterator[float] = iter((12.0, 14.0, 14.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    meter = Meter(lines=100, skipped_done=20, began=10.0)
    assert meter.done == 20 and meter.seconds_left is None and meter.seconds == 2.0
    meter.completed, meter.errors, meter.tokens_seen = 15, 5, 80
    assert meter.seconds_left == 4.0 / 20 * 60 and meter.tokens_per_second == 20.0
    meter.ended = 30.0
    assert json.loads(json.dumps(meter.as_dict()))["seconds"] == 20.0

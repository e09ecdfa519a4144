"""Batch jobs that are killed again and again: in the end each line has one result, and it is the one it would have had anyway."""

from __future__ import annotations

import os
import random
import shlex
import signal
import time
from pathlib import Path

import pytest

from arctic_trt.runtime.jobs.output_file import record_path
from tests.faults.killed_jobs import Death, start
from tests.support.batch_jobs import mixed_lines, read_results, write_lines
from tests.support.engines import build_engine
from tests.support.jobs import quantize

NUM_LINES = 100
PACE_S = 0.02  # the job is still at work when somebody who has lost the processor comes to kill it
PATIENCE_S = 30.0


@pytest.fixture
def argv(small_model: Path, tmp_path: Path) -> list[str]:
    quantize(small_model, tmp_path / "checkpoint", qformat="full_prec", tp_size=1)
    engine = build_engine(tmp_path / "checkpoint", tmp_path / "engine", max_batch_size=4, max_seq_len=64)
    lines = write_lines(tmp_path / "in.jsonl", mixed_lines(NUM_LINES, 64))
    files = {"--engine_dir": engine, "--input_file": lines, "--output_file": tmp_path / "out.jsonl", "--end_id": -1}
    return ["run", *(str(word) for pair in files.items() for word in pair), "-q"]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def errors(tmp_path: Path) -> Path:
    return tmp_path / "errors.log"


def finish(argv: list[str], errors: Path) -> int | None:
    process = start(argv, errors)
    process.join()
    return process.exitcode


def wait_for_lines(path: Path, count: int) -> None:
    until = time.monotonic() + PATIENCE_S
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < until
        time.sleep(0.002)


def test_killed_ten_times_each_line_is_done_once(argv: list[str], output: Path, errors: Path) -> None:
    assert finish(argv, errors) == 0
    expected, draw, done = read_results(output), random.Random(6), b""
    assert len(expected) == NUM_LINES
    output.unlink()
    record_path(output).unlink()
    for death in range(10):
        lines = done.count(b"\n")
        if death % 2:
            process = start(argv, errors, pace_s=PACE_S)
            wait_for_lines(output, lines + draw.randrange(5))
            time.sleep(draw.random() * 2 * PACE_S)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        else:
            process = start(argv, errors, death=Death(draw.randrange(6), draw.random()))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kept = done[: done.rfind(b"\n") + 1]
        done = output.read_bytes()
        assert done.startswith(kept), "what was whole stays as it is, and is not done again"
    assert 0 < done.count(b"\n") < NUM_LINES, "there was something left to do after the last death"
    assert finish(argv, errors) == 0
    assert output.read_bytes().startswith(done[: done.rfind(b"\n") + 1]) and read_results(output) == expected


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT], ids=lambda by: by.name)
def test_interrupted_it_says_how_to_go_on(by: signal.Signals, argv: list[str], output: Path, errors: Path) -> None:
    process = start(argv, errors, pace_s=PACE_S)
    wait_for_lines(output, 3)
    assert process.pid is not None
    os.kill(process.pid, by)
    process.join()
    assert process.exitcode == 130
    assert f"arctic-trt: error: Interrupted. To go on: arctic-trt {shlex.join(argv)}" in errors.read_text()
    assert output.read_bytes().endswith(b"\n")
    assert finish(argv, errors) == 0 and len(read_results(output)) == NUM_LINES


def test_two_instances_with_one_output(argv: list[str], output: Path, errors: Path) -> None:
    first = start(argv, errors.with_name("first.log"), pace_s=PACE_S)
    wait_for_lines(output, 1)
    assert finish(argv, errors) == 3 and "Another process is writing" in errors.read_text()
    first.join()
    assert first.exitcode == 0 and len(read_results(output)) == NUM_LINES

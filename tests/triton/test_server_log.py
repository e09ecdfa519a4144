"""What tritonserver says, sorted."""

from __future__ import annotations

import io
import logging

import pytest

from arctic_trt.triton.server_log import ServerLog

START = "1121 13:54:40.754117 14760 model_lifecycle.cc:472] "


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, package_logger: logging.Logger) -> pytest.LogCaptureFixture:
    package_logger.propagate = True
    caplog.set_level(logging.INFO, "arctic_trt")
    return caplog


def follow(*lines: str) -> tuple[ServerLog, list[tuple[str, bool]]]:
    models: list[tuple[str, bool]] = []
    log = ServerLog(lambda name, loaded: models.append((name, loaded)))
    log.follow(io.StringIO("".join(f"{line}\n" for line in lines)))
    return log, models


def test_models_that_load(heard: pytest.LogCaptureFixture) -> None:
    _, models = follow(f'I{START}"loading: arctic:1"', f"I{START}\"successfully loaded 'arctic'\"")
    assert models == [("arctic", False), ("arctic", True)] and heard.records == []


@pytest.mark.parametrize(
    "line",
    [
        f'E{START}"CudaDriverHelper has not been initialized."',
        f'W{START}"Unable to allocate pinned system memory, pinned memory pool will not be available"',
        "Error: Failed to initialize NVML",
        f'W{START}"DCGM unable to start: DCGM initialization error"',
        "Signal (15) received.",
        f"I{START}",
        "+---------+---------+",
        "| arctic  | READY   |",
        "",
        "At:",
        "  /models/arctic/1/model.py(15): initialize",
        f'E{START}"Invalid argument: ensemble ensemble contains models that are not available or ambiguous: arctic"',
    ],
)
def test_noise_is_for_those_who_ask(line: str, heard: pytest.LogCaptureFixture) -> None:
    log, _ = follow(line)
    assert heard.records == [] and log.last_words() == ""


def test_what_matters_is_said_at_its_weight(heard: pytest.LogCaptureFixture) -> None:
    log, _ = follow(f'W{START}"a warning"', "Rank 3 ended by a signal", f'E{START}"the disk is full"', f'I{START}"a notice"')
    assert [(record.levelname, record.getMessage()) for record in heard.records] == [
        ("WARNING", "tritonserver: a warning"),
        ("INFO", "Rank 3 ended by a signal"),
        ("ERROR", "tritonserver: the disk is full"),
    ]
    assert log.last_words() == "the disk is full"


def test_models_that_do_not_load_are_the_last_words(heard: pytest.LogCaptureFixture) -> None:
    why = r"Internal: RefusedError: The ranks did not start.\n\nAt:\n  /models/arctic/1/model.py(12): initialize\n"
    log, _ = follow(
        f'E{START}"ERROR: Failed to create instance: {why}"',
        f"E{START}\"failed to load 'arctic' version 1: {why}\"",
        "error: creating server: Internal - failed to load all models",
        f'W{START}"something else"',
    )
    assert log.last_words() == "arctic did not load: RefusedError: The ranks did not start."
    assert [record.getMessage() for record in heard.records] == ["tritonserver: something else"]

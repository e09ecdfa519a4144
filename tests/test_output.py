"""What a person or a program gets to see."""

from __future__ import annotations

import logging
import sys

import pytest

from arctic_trt.output import Output, duration, gigabytes

ROWS = [("tensors", "58"), ("read", "1.00 GB")]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (957_169_217_536, "957.17 GB"), (2.5e12, "2.50 TB")]
)
def test_bytes_are_read_in_decimal_units(count: float, text: str) -> None:
    assert gigabytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (250, "4 min 10 s"), (3599.6, "1 h 00 min"), (7530, "2 h 05 min")]
)
def test_durations_are_read_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def say_everything(output: Output) -> None:
    output.note("note")
    output.text("text")
    output.piece("piece")
    output.table("Title", ROWS)
    output.result({"a": 1})


def test_a_person_gets_results_on_stdout_and_notes_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(Output())
    assert tuple(capsys.readouterr()) == ("text\npieceTitle\n  tensors  58\n  read     1.00 GB\n", "note\n")


def test_a_program_gets_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(Output(json_mode=True))
    assert tuple(capsys.readouterr()) == ('{"a": 1}\n', "note\npiece")


def test_quiet_leaves_results_only(capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(Output(verbosity=-1))
    assert tuple(capsys.readouterr()) == ("text\npiece", "")


def test_a_terminal_gets_a_drawn_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Output().table("Title", ROWS)
    out = capsys.readouterr().out
    assert "Title" in out and "1.00 GB" in out and out.count("\n") > len(ROWS) + 1


def test_cells_are_drawn_as_they_are_and_some_in_a_style(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("pip install 'arctic-trt[mpi]'", "works"), ("works badly", "[red]")]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for key, value in {"TERM": "xterm-256color", "FORCE_COLOR": "1", "COLUMNS": "80"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    Output().table("Title [1]", rows, ("do", "verdict"), styles={"works": "green"})
    out = capsys.readouterr().out
    assert "Title [1]" in out and "'arctic-trt[mpi]'" in out and "[red]" in out
    assert "\x1b[32mworks" in out and out.count("\x1b[32m") == 1
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    Output().table("Title", rows, styles={"works": "green"})
    assert "\x1b" not in capsys.readouterr().out, "a log has no colours"


@pytest.mark.parametrize(
    ("verbosity", "said"), [(-1, ["error"]), (0, ["info", "warning", "error"]), (1, ["debug", "info", "warning", "error"])]
)
def test_log_records_go_to_stderr_by_verbosity(verbosity: int, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Output(verbosity=verbosity).configure_logging()
    for level in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger("arctic_trt.quantize"), level)("hello")
    out, err = capsys.readouterr()
    assert out == "" and err == "".join(f"{level.upper()}: hello\n" for level in said)


def test_logging_configured_twice_speaks_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        Output().configure_logging()
    logging.getLogger("arctic_trt").warning("hello")
    assert capsys.readouterr().err == "WARNING: hello\n"


def test_what_is_plain_is_plain_on_a_terminal_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output()
    output.plain = True
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.table("Title", ROWS)
    assert capsys.readouterr().out == "Title\n  tensors  58\n  read     1.00 GB\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert not output.terminal and Output().terminal

"""``scripts/compare_runs``: what passes, what does not, and why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_runs"
Logits = npt.NDArray[np.float32]


def compare(*words: object) -> tuple[int, str]:
    done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def save(path: Path, array: Any) -> Path:
    np.save(path, np.asarray(array))
    return path


def run(path: Path, *token_ids: list[int], **more: Any) -> Path:
    outputs = [{"text": "", "token_ids": ids, "prompt_tokens": 2, "finish_reason": "length", **more} for ids in token_ids]
    path.write_text(json.dumps({"outputs": outputs, "seconds": len(path.name)}))
    return path


@pytest.fixture
def logits() -> Logits:
    return np.random.default_rng(0).standard_normal((3, 20, 50)).astype(np.float32)


@pytest.mark.parametrize(
    ("noise", "code", "words"),
    [
        (0.0, 0, "PASS  logits"),
        (0.01, 0, "same likeliest token"),
        (0.2, 1, "FAIL  logits"),
    ],
)
def test_logits_may_differ_a_little(noise: float, code: int, words: str, logits: Logits, tmp_path: Path) -> None:
    other = logits + noise * np.random.default_rng(1).standard_normal(logits.shape).astype(np.float32)
    found, text = compare("logits", save(tmp_path / "a.npy", logits), save(tmp_path / "b.npy", other))
    assert found == code and words in text


def test_a_few_positions_may_go_to_another_expert(logits: Logits, tmp_path: Path) -> None:
    other = logits.copy()
    other[0, :3] = -other[0, :3]
    found, text = compare("logits", save(tmp_path / "a.npy", logits), save(tmp_path / "b.npy", other))
    assert found == 0 and "worst 2.0" in text and "95.0%" in text
    other[1, :5] = -other[1, :5]
    assert compare("logits", tmp_path / "a.npy", save(tmp_path / "b.npy", other))[0] == 1


def test_padding_is_not_compared(logits: Logits, tmp_path: Path) -> None:
    logits[2, 5:] = 0
    found, text = compare("logits", save(tmp_path / "a.npy", logits), save(tmp_path / "b.npy", logits))
    assert found == 0 and "at 45 positions" in text


def test_logits_that_cannot_be_compared(logits: Logits, tmp_path: Path) -> None:
    a = save(tmp_path / "a.npy", logits)
    code, text = compare("logits", a, save(tmp_path / "b.npy", logits[:, :-1]))
    assert code == 1 and "expected shape [3, 20, 50], found [3, 19, 50]" in text
    logits[0, 0, 0] = np.nan
    code, text = compare("--name", "tiny:", "logits", a, save(tmp_path / "b.npy", logits))
    assert code == 1 and "FAIL  tiny: logits" in text and "found NaN" in text


def test_wrong_logits_excuse_no_tokens(logits: Logits, tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.npy", logits), save(tmp_path / "b.npy", -logits)
    assert compare("logits", a, b, "--tolerance_file", tmp_path / "tolerance")[0] == 1
    assert float((tmp_path / "tolerance").read_text()) == pytest.approx(6 * 0.05, rel=0.1)


PROMPTS = [[1, 2, -1], [1, 2, 3]]


def own_logits(margin: float) -> Logits:
    """At the position after which run A says 7: token 7 leads token 8 by ``margin``."""
    own = np.zeros((2, 5, 10), np.float32)
    own[0, 2, 7], own[0, 2, 8] = margin, 0.0
    return own


@pytest.mark.parametrize(
    ("margin", "allowed", "code"),
    [(0.125, 0, 0), (0.25, 0, 0), (0.3, 0, 1), (0.3, 1, 0), (-0.3, 0, 1), (np.nan, 0, 1), (np.inf, 0, 1)],
    ids=["near tie", "at the tolerance", "clear", "one clear is allowed", "other logits", "NaN", "infinity"],
)
def test_tokens_may_part_at_a_near_tie(margin: float, allowed: int, code: int, tmp_path: Path) -> None:
    a = run(tmp_path / "a.json", [5, 7, 6], [4, 4])
    b = run(tmp_path / "b.json", [5, 8, 1], [4, 4])
    words = [save(tmp_path / "p.npy", PROMPTS), a, b, save(tmp_path / "own.npy", own_logits(margin))]
    found, text = compare("tokens", *words, "--tolerance", 0.25, "--max_unexplained", allowed)
    assert found == code and "3 of 5 before the first difference" in text
    assert ("clear preferences reversed: 1" in text and "prompt 0 at token 1" in text) == (not abs(margin) <= 0.25)


def test_a_text_that_ends_early_is_not_explained(tmp_path: Path) -> None:
    words = [save(tmp_path / "p.npy", PROMPTS), run(tmp_path / "a.json", [5, 7], [4]), run(tmp_path / "b.json", [5], [4])]
    code, text = compare("tokens", *words, save(tmp_path / "own.npy", own_logits(0)), "--tolerance", 9, "--max_unexplained", 0)
    assert code == 1 and "prompt 0 at token 1 by inf" in text


def test_the_tolerance_is_what_errors_of_the_allowed_size_explain(logits: Logits, tmp_path: Path) -> None:
    """Logits of deviation 1, of which six times 5 % is 0.3."""
    prompts, own = save(tmp_path / "p.npy", PROMPTS), logits[:2]
    a, b = run(tmp_path / "a.json", [7], [4]), run(tmp_path / "b.json", [8], [4])
    for margin, code in ((0.25, 0), (0.35, 1)):
        own[0, 1, 7] = own[0, 1, 8] + margin
        words = [prompts, a, b, save(tmp_path / "own.npy", own), "--max_unexplained", 0]
        assert compare("tokens", *words)[0] == code


def test_outputs_of_other_prompts_are_not_compared(tmp_path: Path) -> None:
    words = [save(tmp_path / "p.npy", PROMPTS), run(tmp_path / "a.json", [5], [4]), run(tmp_path / "b.json", [5])]
    code, text = compare("tokens", *words, save(tmp_path / "own.npy", own_logits(0)), "--tolerance", 9)
    assert code == 1 and "expected 2 outputs, found 2 and 1, with logits of 2" in text


def test_no_tokens_and_no_logits_are_no_agreement(logits: Logits, tmp_path: Path) -> None:
    a = run(tmp_path / "a.json", [], [])
    words = [save(tmp_path / "p.npy", PROMPTS), a, a, save(tmp_path / "own.npy", own_logits(0))]
    assert compare("tokens", *words, "--tolerance", 9)[0] == 1
    zeros = save(tmp_path / "zeros.npy", logits * 0)
    code, text = compare("logits", zeros, zeros)
    assert code == 1 and "expected logits, found zeros alone" in text
    nothing = run(tmp_path / "nothing.json")
    assert compare("equal", nothing, nothing)[0] == 1


@pytest.mark.parametrize("content", [None, b"", b"{}", b"half a line {"], ids=["missing", "empty", "no outputs", "broken"])
@pytest.mark.parametrize("kind", ["logits", "tokens", "equal", "stopped"])
def test_what_cannot_be_read_fails_in_a_line(kind: str, content: bytes | None, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    if content is not None:
        bad.write_bytes(content)
    words = {"logits": [bad, bad], "tokens": [bad, bad, bad, bad], "equal": [bad, bad], "stopped": [bad, bad, "x"]}[kind]
    code, text = compare("--name", "tiny:", kind, *words)
    assert code == 1 and text.startswith(f"FAIL  tiny: {kind} ") and text.count("\n") == 1
    assert "expected runs that can be compared, found " in text


def texts(path: Path, *endings: tuple[str, str]) -> Path:
    outputs = [{"text": text, "token_ids": [1], "prompt_tokens": 2, "finish_reason": reason} for text, reason in endings]
    path.write_text(json.dumps({"outputs": outputs}))
    return path


def test_stop_words(tmp_path: Path) -> None:
    whole = texts(tmp_path / "a.json", ("one two three two", "length"), ("four", "stop"))
    assert compare("word", whole) == (0, "three\n")
    code, text = compare("stopped", whole, texts(tmp_path / "b.json", ("one ", "stop"), ("four", "stop")), "two")
    assert code == 0 and "1 of 2 texts ended before 'two'" in text
    for ending in (("one two three ", "stop"), ("one two", "stop"), ("one ", "length")):
        code, text = compare("stopped", whole, texts(tmp_path / "b.json", ending, ("four", "stop")), "two")
        assert code == 1 and "prompt 0" in text
    code, text = compare("stopped", whole, whole, "five")
    assert code == 1 and "found it in none" in text


def test_prompts_with_their_tokens_behind_them(tmp_path: Path) -> None:
    code, _ = compare("extend", save(tmp_path / "p.npy", PROMPTS), run(tmp_path / "a.json", [5], [6, 7]), tmp_path / "out.npy")
    assert code == 0 and np.load(tmp_path / "out.npy").tolist() == [[1, 2, 5, -1, -1], [1, 2, 3, 6, 7]]


def test_equal_runs(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a.json", [1], [2]), run(tmp_path / "another.json", [1], [2])
    assert compare("equal", a, b) == (0, f"PASS  {'equal':<34} 2 outputs\n")
    code, text = compare("equal", a, run(tmp_path / "b.json", [1], [3]))
    assert code == 1 and "prompts [1] differ" in text
    code, text = compare("equal", a, run(tmp_path / "b.json", [1]))
    assert code == 1 and "expected 2 equal outputs, found 1 outputs" in text
    assert compare("equal", a, run(tmp_path / "b.json", [1], [2], finish_reason="stop"))[0] == 1

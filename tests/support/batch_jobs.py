"""Batch jobs as tests need them: inputs, and what an output says."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any


def write_lines(path: Path, lines: list[dict[str, Any] | str]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def mixed_lines(count: int, vocab_size: int, seed: int = 1) -> list[dict[str, Any] | str]:
    """Requests of all kinds; every seventh is wrong."""
    draw = random.Random(seed)
    lines: list[dict[str, Any] | str] = []
    for index in range(count):
        prompt = [draw.randrange(5, vocab_size) for _ in range(draw.randrange(1, 12))]
        line: dict[str, Any] = {"custom_id": f"r{index}", "prompt": prompt, "max_tokens": draw.randrange(1, 10)}
        if index % 3 == 1:
            line |= {"temperature": 1.0, "top_k": 20, "n": 2}
        if index % 7 == 3:
            line |= draw.choice([{"max_tokens": -1}, {"prompt": [vocab_size]}, {"colour": "red"}])
        lines.append(line)
    return lines


def read_results(path: Path) -> dict[str, Any]:
    """By the result's id, without the time it was made at; fails if one is there twice."""
    results: dict[str, Any] = {}
    for line in path.read_text().splitlines():
        value = json.loads(line)
        if value["response"]:
            value["response"]["body"].pop("created")
        assert value["id"] not in results
        results[value["id"]] = value
    return results

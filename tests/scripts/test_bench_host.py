"""``scripts/bench_host``: the host's part of a step, in small."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.engines import ROOT


def test_every_number_of_sequences_is_measured_both_ways() -> None:
    words = [sys.executable, ROOT / "scripts" / "bench_host", "--sequences", "1,3", "--context", "40", "--steps", "5", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = [(row["sequences"], row["tokens"]) for row in found["rows"]]
    assert rows == [(count, how) for count in (1, 3) for how in ("likeliest token", "drawn")]
    assert all(0 < row["best_us"] <= row["median_us"] for row in found["rows"]) and found["context"] == 40

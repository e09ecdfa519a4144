"""``scripts/bench_engine``: what it counts, what it reads from llama.cpp's tools, and a whole run with stand-ins for those."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TOOLS = ("llama-bench", "llama-batched-bench", "convert_hf_to_gguf.py")

BENCH = """[
  {"n_threads": 2, "n_prompt": 512, "n_gen": 0, "avg_ns": 2640098519, "avg_ts": 193.9, "samples_ts": [192.4, 196.0]},
  {"n_threads": 2, "n_prompt": 0, "n_gen": 8, "avg_ns": 2399459259, "avg_ts": 53.5, "samples_ts": [49.1, 56.6]}
]"""
BATCHED = """

{"n_kv_max": 4096, "n_threads": 2, "pp": 128, "tg": 8, "pl": 1, "t_tg": 2.476, "speed_tg": 51.7, "speed": 79.4}
{"n_kv_max": 4096, "n_threads": 2, "pp": 128, "tg": 8, "pl": 16, "t_tg": 20.2, "speed_tg": 101.4, "speed": 66.3}

"""
TOOL = """#!{python}
import sys
from pathlib import Path
with Path({log!r}).open("a") as log:
    print(Path(sys.argv[0]).name, *sys.argv[1:], file=log)
print({answer!r})
"""
CONVERTER = """
import sys
from pathlib import Path
from conversion.arctic import ArcticModel
def main():
    said = []
    class Writer:
        gguf_writer = type("Gguf", (), {"add_tokenizer_model": lambda self, name: said.append(name)})()
    ArcticModel.set_vocab(Writer())
    model, outfile = Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--outfile") + 1])
    outfile.write_text(" ".join([str((model / "config.json").exists()), sys.argv[sys.argv.index("--outtype") + 1], *said]))
"""


def load(name: str) -> Any:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))


engine_probe, llama_cpp_tools = load("engine_probe"), load("llama_cpp_tools")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return runpy.run_path(str(SCRIPTS / "bench_engine"))
    finally:
        sys.path.remove(str(SCRIPTS))


def run_script(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / "bench_engine", *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def fake_llama_cpp(directory: Path) -> Path:
    """A folder as a build of the sources leaves it, whose tools log their words and print the same every time."""
    (directory / "build" / "bin").mkdir(parents=True)
    (directory / "conversion").mkdir()
    (directory / "conversion" / "arctic.py").write_text(
        "class ArcticModel:\n    def set_vocab(self):\n        raise SystemExit(3)\n"
    )
    (directory / TOOLS[2]).write_text(CONVERTER)
    for name, answer in zip(TOOLS, (BENCH, BATCHED), strict=False):
        tool = directory / "build" / "bin" / name
        tool.write_text(TOOL.format(python=sys.executable, log=str(directory / "log"), answer=answer))
        tool.chmod(0o755)
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The result of a whole run, and where it worked; llama.cpp is in its folder ``llama``."""
    work = tmp_path_factory.mktemp("bench")
    words = ["--work_dir", work, "--llama_cpp", fake_llama_cpp(work / "llama"), "--size", "tiny", "--rounds", 1]
    done = run_script(*words, "--threads", 1, "--output_tokens", 8, "--json")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("round")] == ["round 1 of 1"]
    return json.loads(done.stdout), work


def test_ours_is_measured_and_compared(run: tuple[dict[str, Any], Path]) -> None:
    result, _ = run
    theirs = {"prefill": 193.9, "decode": 53.5, "batch_decode": 101.4}
    for name, figure in result["figures"].items():
        assert figure["theirs"] == theirs[name] and figure["ours"] > 0
        middle, least, largest = figure["ratio"]
        assert least <= middle <= largest and middle == pytest.approx(figure["ours"] / theirs[name])
    assert result["threads"] == 1 and result["load"] == {"prompt": 512, "output": 8, "batch": 16, "batch_prompt": 128}


def test_shares_are_of_the_measured_bandwidth(run: tuple[dict[str, Any], Path]) -> None:
    result, _ = run
    for name, batch in (("decode", 1), ("batch_decode", 16)):
        figure = result["figures"][name]
        _, least, largest = figure["roofline_share"]
        rate = figure["ours"] / batch * figure["step_bytes"] / 1e9
        assert least * result["bandwidth_gb_s"][1] <= rate * 1.001 and rate <= largest * result["bandwidth_gb_s"][2] * 1.001
    sizes = [result["figures"][name]["step_bytes"] for name in ("decode", "batch_decode")]
    assert sizes[0] < sizes[1] < result["weight_bytes"] + result["kv_bytes"]


def test_memory_is_held_to_what_has_to_be_there(run: tuple[dict[str, Any], Path]) -> None:
    result, work = run
    assert result["weight_bytes"] == (work / "tiny" / "engine" / "rank0.safetensors").stat().st_size
    assert result["kv_bytes"] == 16 * (128 + 8) * 2 * 2 * 8 * 16  # layers, keys and values, heads, e4m3
    assert result["resident_limit_bytes"] == result["weight_bytes"] + result["kv_bytes"] + 300e6
    assert 100e6 < result["resident_bytes"] <= result["peak_resident_bytes"] < 2e9
    assert 1 <= result["distinct_tokens"] <= 16


def test_the_peer_is_given_the_same_model_and_lengths(run: tuple[dict[str, Any], Path]) -> None:
    _, work = run
    model = work / "tiny" / "model-q8_0.gguf"
    assert model.read_text() == "True q8_0 none"
    single = f"llama-bench -m {model} -t 1 -p 512 -n 8 -r 1 -o json"
    many = f"llama-batched-bench -m {model} -t 1 -npp 128 -ntg 8 -npl 16 -c 4096 --output-format jsonl"
    assert (work / "llama" / "log").read_text().splitlines() == [single, many]


def test_what_is_there_is_kept(run: tuple[dict[str, Any], Path], script: dict[str, Any]) -> None:
    work = run[1] / "tiny"
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}
    assert script["prepare"](work, "tiny") == work / "engine"
    llama_cpp_tools.convert(llama_cpp_tools.find_llama_cpp(run[1] / "llama"), work / "nowhere", work / "model-q8_0.gguf")
    assert len(before) == 3 and {path: path.stat().st_mtime_ns for path in before} == before


def test_the_table_says_what_was_compared(run: tuple[dict[str, Any], Path], script: dict[str, Any]) -> None:
    result, _ = run
    rows = {row[0].strip(): row[1:] for row in script["table"](result, engine_probe.Load(output=8))}
    assert [row[1] for row in rows.values() if row[1]] == ["193.9 tokens/s", "53.5 tokens/s", "101.4 tokens/s"]
    assert "prefill of 512 tokens" in rows and "decode, 16 sequences" in rows
    assert "weights" in rows["resident memory"][2] and rows["resident memory"][2].endswith("300 MB")


def test_without_a_peer_only_ours_is_shown(run: tuple[dict[str, Any], Path], script: dict[str, Any]) -> None:
    report = dict.fromkeys((*script["FIGURES"], "distinct_tokens", "resident_bytes", "peak_resident_bytes"), 2.0)
    engine = script["read_engine_config"](run[1] / "tiny" / "engine")
    round = script["Round"](bandwidth=1e10, ours=report, theirs=[])
    result = script["summarize"]([round], engine, 100, engine_probe.Load())
    assert all("theirs" not in figure and "ratio" not in figure for figure in result["figures"].values())
    rows = script["table"](result, engine_probe.Load())
    assert [row[1:] for row in rows if "tokens" in row[1]] == [("2.0 tokens/s", "-", "-")] * 3


def test_ratios_are_taken_within_a_round(run: tuple[dict[str, Any], Path], script: dict[str, Any]) -> None:
    """A machine that is ten times as slow in one round has to change nothing."""
    engine = script["read_engine_config"](run[1] / "tiny" / "engine")
    others = {"distinct_tokens": 1.0, "resident_bytes": 1.0, "peak_resident_bytes": 1.0}
    rounds = [
        script["Round"](bandwidth=speed, ours=dict.fromkeys(script["FIGURES"], 3 * speed) | others, theirs=[speed] * 3)
        for speed in (1e9, 1e10, 2e9)
    ]
    result = script["summarize"](rounds, engine, 100, engine_probe.Load())
    for figure in result["figures"].values():
        assert figure["ratio"] == pytest.approx([3, 3, 3]) and figure["ours"] == 6e9 and figure["theirs"] == 2e9
    share = result["figures"]["decode"]["roofline_share"]
    assert share == pytest.approx([3 * result["figures"]["decode"]["step_bytes"]] * 3)


@pytest.mark.parametrize("missing", TOOLS)
def test_a_missing_tool_is_named_before_anything_is_made(tmp_path: Path, missing: str) -> None:
    llama = fake_llama_cpp(tmp_path / "llama")
    next(llama.rglob(missing)).unlink()
    with pytest.raises(click.ClickException, match=f"lacks {missing}, also in build/bin; .*cmake --build build"):
        llama_cpp_tools.find_llama_cpp(llama)


def test_the_refusal_comes_first(tmp_path: Path, script: dict[str, Any]) -> None:
    words = ["--work_dir", tmp_path / "work", "--llama_cpp", tmp_path / "none", "--size", "tiny"]
    done = CliRunner().invoke(script["main"], list(map(str, words)))
    assert done.exit_code == 1 and all(tool in done.output for tool in TOOLS)
    assert not (tmp_path / "work").exists()


def test_more_threads_than_cores_are_refused(script: dict[str, Any]) -> None:
    with pytest.raises(click.ClickException, match=r"--threads 100000: only \d+ cores"):
        script["hold_to_cores"](100000)


def test_a_failed_tool_is_quoted(tmp_path: Path) -> None:
    llama = fake_llama_cpp(tmp_path / "llama")
    next(llama.rglob("llama-bench")).write_text("#!/bin/sh\necho cannot load >&2\nexit 4\n")
    tools = llama_cpp_tools.find_llama_cpp(llama)
    with pytest.raises(click.ClickException, match=r"llama-bench ended with 4:\ncannot load"):
        llama_cpp_tools.measure(tools, tmp_path / "x", threads=1, prompt=1, output=1, batch=1, batch_prompt=1)


def test_parsing_takes_the_row_that_was_asked_for() -> None:
    assert llama_cpp_tools.parse_bench(BENCH, 512, 8) == (193.9, 53.5)
    assert llama_cpp_tools.parse_batched_bench(BATCHED, 1) == 51.7
    assert llama_cpp_tools.parse_batched_bench(BATCHED, 16) == 101.4


def test_a_benchmark_that_left_the_batch_out_is_refused() -> None:
    """llama-batched-bench skips, without a word, what does not fit its context."""
    with pytest.raises(click.ClickException, match="printed 0 rows for 32 sequences"):
        llama_cpp_tools.parse_batched_bench(BATCHED, 32)


def step(seconds: float, *sequences: int) -> Any:
    return engine_probe.StepTime(seconds, {sequence: sequence * 7 % 3 for sequence in sequences})


def test_only_steps_that_decode_everything_count() -> None:
    steps = [step(9, 0), step(9, 0, 1), step(1, 0, 1), step(3, 0, 1), step(9, 1)]
    kept = engine_probe.decode_steps(steps, 2)
    assert kept == steps[2:4] and engine_probe.tokens_per_s(kept) == 1.0


def test_a_run_without_such_a_step_is_an_error() -> None:
    with pytest.raises(SystemExit, match="No step decoded all 2 sequences"):
        engine_probe.decode_steps([step(1, 0), step(1, 1)], 2)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.integers(1, 20))
def test_whenever_the_sequences_begin_the_rate_is_that_of_the_full_steps(delays: Sequence[int], shared: int) -> None:
    """Sequences that begin ``delays`` steps late and end together decode all together for ``shared`` steps of half a second."""
    batch, last = len(delays), max(delays)
    steps = [
        step(0.5 if number > last else 7.0, *(index for index, delay in enumerate(delays) if delay <= number))
        for number in range(last + shared + 1)
    ]
    kept = engine_probe.decode_steps(steps, batch)
    assert len(kept) == shared and engine_probe.tokens_per_s(kept) == pytest.approx(2 * batch)


def test_equal_tokens_in_a_step_are_seen() -> None:
    steps = [engine_probe.StepTime(1, {0: 5, 1: 5, 2: 6}), engine_probe.StepTime(1, {0: 1, 1: 2, 2: 3})]
    assert engine_probe.distinct_tokens(steps) == 2.5


def test_the_models_sizes_are_those_of_the_comparison(script: dict[str, Any]) -> None:
    from arctic_trt.model.config import parse_config
    from arctic_trt.model.names import hf_shapes

    config = parse_config({**load("synthetic").BASE, **script["SIZES"]["mid"]})
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_local_experts) == (
        12,
        2048,
        1408,
        20,
    )
    matrices = [shape for name, shape in hf_shapes(config).items() if "layers" in name and len(shape) == 2]
    assert sum(rows * columns for rows, columns in matrices) > 2e9

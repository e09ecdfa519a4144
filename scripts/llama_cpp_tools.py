"""llama.cpp as a peer to measure beside: its tools, a Q8_0 file of one of our random checkpoints, and its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

CONVERT = """
import sys
directory = sys.argv.pop(1)
sys.path[:0] = [directory, directory + "/gguf-py"]
import convert_hf_to_gguf
from conversion.arctic import ArcticModel
ArcticModel.set_vocab = lambda self: self.gguf_writer.add_tokenizer_model("none")
convert_hf_to_gguf.main()
"""
"""The converter, but for the vocabulary: random checkpoints have no tokenizer, and the benchmarks draw token ids."""
CONTEXT_STEP = 256
"""llama.cpp rounds a sequence's context to multiples of it, and leaves out what then does not fit."""


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """Where the tools are."""

    bench: Path
    batched_bench: Path
    converter: Path


def find_llama_cpp(directory: Path) -> LlamaCpp:
    """The tools in ``directory`` or, as a build of the sources leaves them, in its ``build/bin``; refuses when one is missing."""
    found, missing = [], []
    for name in ("llama-bench", "llama-batched-bench", "convert_hf_to_gguf.py"):
        places = [place / name for place in (directory, directory / "build" / "bin") if (place / name).is_file()]
        (found if places else missing).append(places[0] if places else name)
    if missing:
        raise click.ClickException(
            f"--llama_cpp {directory} lacks {', '.join(map(str, missing))}, also in build/bin; in llama.cpp's sources: "
            "cmake -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build --target llama-bench llama-batched-bench"
        )
    return LlamaCpp(*map(Path, found))


def convert(tools: LlamaCpp, model_dir: Path, target: Path) -> None:
    """Write the checkpoint as Q8_0, unless that was done before."""
    if target.exists():
        return
    part = target.with_suffix(".part")
    _run([sys.executable, "-c", CONVERT, tools.converter.parent, model_dir, "--outtype", "q8_0", "--outfile", part])
    part.rename(target)


def measure(
    tools: LlamaCpp, model: Path, *, threads: int, prompt: int, output: int, batch: int, batch_prompt: int
) -> list[float]:
    """Tokens a second: prefill of one prompt, decode of one sequence, decode of ``batch`` after prompts of ``batch_prompt``."""
    common = ["-m", model, "-t", threads]
    single = _run([tools.bench, *common, "-p", prompt, "-n", output, "-r", 1, "-o", "json"])
    context = -(-(batch_prompt + output) // CONTEXT_STEP) * CONTEXT_STEP
    lengths = ["-npp", batch_prompt, "-ntg", output, "-npl", batch, "-c", batch * context]
    many = _run([tools.batched_bench, *common, *lengths, "--output-format", "jsonl"])
    return [*parse_bench(single, prompt, output), parse_batched_bench(many, batch)]


def parse_bench(text: str, prompt: int, output: int) -> tuple[float, float]:
    """(prefill, decode) in tokens a second, of ``llama-bench -o json``."""
    rates = {(row["n_prompt"], row["n_gen"]): row["avg_ts"] for row in json.loads(text)}
    return rates[prompt, 0], rates[0, output]


def parse_batched_bench(text: str, batch: int) -> float:
    """Decode of all ``batch`` sequences together in tokens a second, of ``llama-batched-bench --output-format jsonl``."""
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    rates = [row["speed_tg"] for row in rows if row["pl"] == batch]
    if len(rates) != 1:
        raise click.ClickException(f"llama-batched-bench printed {len(rates)} rows for {batch} sequences, expected one:\n{text}")
    return rates[0]


def _run(command: list[object]) -> str:
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{words[0]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout

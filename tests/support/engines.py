"""Engines as tests need them: built by the library's front door, run in this process or under mpirun."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arctic_trt.checkpoint.trtllm import TrtCheckpoint
from arctic_trt.engine.config import plan_build_config
from arctic_trt.engine.torch.build import build_torch_engine, plan_torch_build
from arctic_trt.runtime.runner import RunOptions, RunResult, run

ROOT = Path(__file__).resolve().parents[2]


def build_engine(checkpoint_dir: Path, engine_dir: Path, **limits: Any) -> Path:
    """Build a torch engine with ``limits`` such as ``max_batch_size``."""
    checkpoint = TrtCheckpoint(checkpoint_dir)
    build_torch_engine(plan_torch_build(checkpoint, engine_dir, plan_build_config(checkpoint.config, **limits)))
    checkpoint.close()
    return engine_dir


def write_prompts(path: Path, prompts: list[list[int]]) -> Path:
    """An --input_file of token ids, padded on the right with -1."""
    rows = np.full((len(prompts), max(map(len, prompts))), -1, np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    np.save(path, rows)
    return path


def complete(
    engine_dir: Path, prompts: list[list[int]], tmp_path: Path, *, max_output_len: int = 8, **options: Any
) -> tuple[RunResult, Tensor]:
    """Run an engine of one rank in this process; returns the result and the prompts' logits [batch, longest, vocab]."""
    logits = tmp_path / "logits.npy"
    result = run(
        RunOptions(
            engine_dir=engine_dir,
            input_file=write_prompts(tmp_path / "prompts.npy", prompts),
            max_output_len=max_output_len,
            output_logits_npy=logits,
            **options,
        )
    )
    assert result is not None
    return result, torch.from_numpy(np.load(logits))


@dataclass(frozen=True)
class Job:
    """A finished MPI job."""

    code: int
    out: str
    err: str


def mpirun(ranks: int, *words: object, timeout_s: float = 60, **environ: str) -> Job:
    """Run ``python WORDS...`` on ``ranks`` ranks."""
    done = subprocess.run(
        mpirun_command(ranks, *words), cwd=ROOT, env=mpi_environ(**environ), capture_output=True, timeout=timeout_s, check=False
    )
    return Job(done.returncode, *(stream.decode(errors="replace") for stream in (done.stdout, done.stderr)))


def mpirun_command(ranks: int, *words: object) -> list[str]:
    """The launcher beside this Python, which may start more ranks than there are cores."""
    launcher = Path(sys.executable).parent / "mpirun"
    return [
        str(launcher) if launcher.exists() else "mpirun",
        *("-n", str(ranks), "--oversubscribe", "--allow-run-as-root", sys.executable),
        *map(str, words),
    ]


def mpi_environ(**more: str) -> dict[str, str]:
    """One thread a rank, and a HOME, without which Open MPI does not start."""
    return {"HOME": "/tmp", **os.environ, "OMP_NUM_THREADS": "1", **more}

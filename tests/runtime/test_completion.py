"""Completions and listeners: what servers share with the engine, and what they need not load for it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch

from arctic_trt.errors import ArcticTrtError
from arctic_trt.runtime.completion import Completion, Listeners


def test_who_listens_to_nothing_hears_nothing() -> None:
    listeners = Listeners()
    listeners.on_piece(0, "a")
    listeners.on_token(0, 1)
    listeners.on_settled(0, [1], None)
    listeners.on_prompt_logits(0, 0, torch.from_numpy(np.zeros((1, 2), np.float32)))
    listeners.on_done(0, Completion(prompt=(1,), token_ids=(2,), text="a", finish_reason="stop"))
    assert listeners.on_error is None, "without a listener an error is raised"


def test_an_error_is_told_with_its_request() -> None:
    heard: list[tuple[int, str]] = []
    listeners = Listeners(on_error=lambda index, error: heard.append((index, error.message)))
    assert listeners.on_error is not None
    listeners.on_error(3, ArcticTrtError("The logits are not finite.", "Verify it."))
    assert heard == [(3, "The logits are not finite.")]


def test_neither_torch_nor_mpi_is_needed() -> None:
    words = "import sys, arctic_trt.runtime.completion; print({'torch', 'mpi4py', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

"""The forward pass of one rank against float32 references, whole, in parts, and in company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from arctic_trt.engine.config import read_engine_config
from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.communicator import SoloCommunicator
from arctic_trt.runtime.step import Chunk, Step
from arctic_trt.runtime.worker import Worker, load_worker
from tests.runtime.conftest import Model
from tests.support.fp8_emulation import error_of, fp8_logits
from tests.support.naive_forward import naive_logits

BLOCK = 8
MAX_ERROR, MEAN_ERROR = 1e-4, 1e-5  # the interface allows 2e-2 and 3e-3; nothing is rounded to bf16, so this holds
RECIPES = {"fp8": {}, "kv_float": {"kv_cache_dtype": "none"}, "bf16": {"qformat": "full_prec"}}


def make_worker(engine_dir: Path, blocks: int = 16) -> Worker:
    config, mapping, quant = read_engine_config(engine_dir).network()
    worker = load_worker(engine_dir, config, quant, mapping.rank(0), SoloCommunicator())
    worker.reserve(KvRoom(blocks, block_tokens=BLOCK))
    return worker


def chunk(tokens: list[int], start: int, count: int, sequence: int = 0, *, all_logits: bool = True) -> Chunk:
    """The blocks of sequence s are s, s + 3, s + 6, ..., assigned as they are needed."""
    part = tuple(tokens[start : start + count])
    return Chunk(
        sequence=sequence,
        start=start,
        tokens=part,
        blocks=tuple(sequence + 3 * block for block in range(-(-start // BLOCK), -(-(start + len(part)) // BLOCK))),
        logits_from=0 if all_logits else len(part) - 1,
    )


def lead(worker: Worker, step: Step) -> Tensor:
    """The logits of a step, all of which are wanted."""
    outcome = worker.lead(step)
    assert outcome is not None
    return outcome.logits()


def logits_in_parts(worker: Worker, tokens: list[int], size: int) -> Tensor:
    parts = [lead(worker, Step(chunks=(chunk(tokens, start, size),))) for start in range(0, len(tokens), size)]
    worker.lead(Step(freed=(0,)))
    return torch.cat(parts)


def reference(model: Model, name: str, tokens: list[int]) -> Tensor:
    if name == "bf16":
        return naive_logits(model.config, load_file(model.hf_dir / "model.safetensors"), tokens)
    return fp8_logits(model.checkpoint(name, **RECIPES[name]), tokens)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", ["tiny", "unlike"])
def test_logits_equal_a_float32_reference(shape: str, name: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(shape)
    tokens = model.prompts(24)[0]
    worker = make_worker(model.engine(name, **RECIPES[name]))
    expected = reference(model, name, tokens)
    for size in (24, 7, 1):
        largest, mean = error_of(logits_in_parts(worker, tokens, size), expected)
        assert largest < MAX_ERROR, f"in parts of {size}"
        assert mean < MEAN_ERROR, f"in parts of {size}"


def test_quantization_is_there_at_all(tiny: Model) -> None:
    """Without this, an engine that ignored all scales and casts could equal a reference that did the same."""
    tokens = tiny.prompts(24)[0]
    fp8, bf16 = (logits_in_parts(make_worker(tiny.engine(name, **RECIPES[name])), tokens, 24) for name in ("fp8", "bf16"))
    largest, mean = error_of(fp8, bf16)
    assert 1e-3 < mean < 0.1 and largest > 1e-2


def test_sequences_packed_into_one_step_do_not_see_each_other(tiny: Model) -> None:
    worker = make_worker(tiny.engine("fp8"))
    prompts = tiny.prompts(9, 1, 30)
    alone = [logits_in_parts(worker, prompt, 16) for prompt in prompts]
    first = Step(chunks=tuple(chunk(prompt, 0, 16, index) for index, prompt in enumerate(prompts)))
    then = Step(chunks=(chunk(prompts[2], 16, 16, 2),), freed=(0, 1))
    together = torch.cat([lead(worker, first), lead(worker, then)])
    expected = torch.cat([alone[0], alone[1], alone[2]])
    assert error_of(together, expected)[0] < MAX_ERROR
    assert list(worker.network.cache.tables) == [2]


def test_only_wanted_positions_have_logits(tiny: Model) -> None:
    worker = make_worker(tiny.engine("fp8"))
    prompts = tiny.prompts(5, 8)
    every = lead(worker, Step(chunks=tuple(chunk(prompt, 0, 8, index) for index, prompt in enumerate(prompts))))
    chunks = tuple(chunk(prompt, 0, 8, index, all_logits=False) for index, prompt in enumerate(prompts))
    last = lead(worker, Step(chunks=chunks, freed=(0, 1)))
    torch.testing.assert_close(last, every[[4, 12]])

"""``ModelRunnerCpp`` as a run uses it, played by the stand-in in this process: answers, and failures in one sentence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.checkpoint.trtllm import TrtCheckpoint
from arctic_trt.engine.config import plan_build_config
from arctic_trt.engine.tensorrt_llm.build import build_trtllm_engine
from arctic_trt.engine.tensorrt_llm.plan import plan_trtllm_build
from arctic_trt.engine.tensorrt_llm.session import Decoding, RuntimeOptions, Shape, TrtLlmSession
from arctic_trt.engine.tensorrt_llm.versions import Versions
from arctic_trt.errors import ArcticTrtError
from arctic_trt.machine import query_gpus
from arctic_trt.recipes import BuildRecipe
from tests.support.jobs import quantize
from tests.trtllm_standin.fixtures import StandIn

SHAPE = Shape(max_batch_size=2, max_input_len=4, max_output_len=3)
GREEDY = Decoding(
    max_new_tokens=3, end_id=-1, stop_ids=(), temperature=1.0, top_k=1, top_p=0.0, repetition_penalty=1.0, random_seed=0
)


@pytest.fixture
def engine(
    trtllm_standin: Callable[..., StandIn],
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    tiny_samples: Path,
    tmp_path: Path,
) -> Callable[..., Path]:
    trtllm_standin().enter(monkeypatch)

    def build(**flags: Any) -> Path:
        quantize(tiny_model, tmp_path / "checkpoint", calib_dataset=str(tiny_samples), tp_size=1)
        checkpoint = TrtCheckpoint(tmp_path / "checkpoint")
        recipe = BuildRecipe(
            checkpoint_dir=checkpoint.checkpoint_dir, output_dir=tmp_path / "engine", timing_cache_dir=tmp_path, **flags
        )
        limits = plan_build_config(checkpoint.config, max_seq_len=16)
        versions = Versions("1.2.1", "10.14.1")
        plan = plan_trtllm_build(recipe, checkpoint, limits, versions=versions, gpus=query_gpus(), available_bytes=10**12)
        assert build_trtllm_engine(plan).complete
        return recipe.output_dir

    return build


def played(prompt: list[int], count: int = 3) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append((7 * ids[-1] + len(ids) + 3) % 512)
    return ids[len(prompt) :]


def test_a_batch_and_a_stream_of_it(engine: Callable[..., Path]) -> None:
    session = TrtLlmSession(engine(), 0, SHAPE, RuntimeOptions())
    prompts = [[1, 2, 3], [4]]
    assert session.generate(prompts, GREEDY) == [played(prompt) for prompt in prompts]
    pieces = list(session.stream(prompts, GREEDY))
    assert pieces[-1] == [played(prompt) for prompt in prompts]
    assert all(len(before[0]) <= len(after[0]) for before, after in pairwise(pieces))
    assert not session.gathers_logits
    session.close()


def test_a_prompt_with_its_logits(engine: Callable[..., Path]) -> None:
    session = TrtLlmSession(engine(gather_context_logits=True), 0, SHAPE, RuntimeOptions())
    [ids], logits_TV = session.generate_one([1, 2, 3], GREEDY)
    assert session.gathers_logits and ids == played([1, 2, 3])
    assert tuple(logits_TV.shape) == (3, 512) and logits_TV.device.type == "cpu"
    assert logits_TV[-1].argmax() == ids[0]


def test_an_engine_that_does_not_load(engine: Callable[..., Path]) -> None:
    directory = engine()
    too_long = Shape(max_batch_size=1, max_input_len=10, max_output_len=10)
    with pytest.raises(ArcticTrtError, match=r"TensorRT-LLM cannot load rank 0 of .*engine: .*\. -v shows the whole message"):
        TrtLlmSession(directory, 0, too_long, RuntimeOptions())


def test_a_request_that_fails(engine: Callable[..., Path]) -> None:
    session = TrtLlmSession(engine(), 0, SHAPE, RuntimeOptions())
    with pytest.raises(ArcticTrtError, match=r"TensorRT-LLM cannot generate: Maximum input length \(5\) exceeds"):
        session.generate([[1, 2, 3, 4, 5]], GREEDY)
    with pytest.raises(ArcticTrtError, match="TensorRT-LLM cannot generate"):
        list(session.stream([[1, 2, 3, 4, 5]], GREEDY))


def test_stdout_is_kept_for_us_alone() -> None:
    program = """
import ctypes, os, sys
from arctic_trt.engine.tensorrt_llm.session import keep_stdout
keep_stdout()
keep_stdout()
os.write(1, b"from C++\\n")
ctypes.CDLL(None).puts(b"buffered")
ctypes.CDLL(None).fflush(None)
print("ours")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "ours\n" and done.stderr == "from C++\nbuffered\n"

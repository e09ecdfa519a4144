"""One engine for many pieces of work: scores that its own logits confirm, and nothing left behind between them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.runtime import open_engine as module
from arctic_trt.runtime.blocks import BLOCK_TOKENS
from arctic_trt.runtime.completion import Listeners
from arctic_trt.runtime.kv_budget import KvBudget
from arctic_trt.runtime.open_engine import OpenEngine, open_engine
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.sampler import Sampling
from arctic_trt.runtime.scoring import Continuation
from tests.runtime.conftest import Model
from tests.support.engines import build_engine, complete
from tests.support.fp8_emulation import fp8_logits

BEGINS = (1, 20, 7, 1)


def continuations(model: Model) -> list[Continuation]:
    return [Continuation(tuple(ids), begin) for ids, begin in zip(model.prompts(30, 21, 9, 2), BEGINS, strict=True)]


def request(index: int, ids: list[int]) -> Request:
    return Request(index=index, prompt=tuple(ids), max_new_tokens=6, sampling=Sampling())


def test_scores_are_what_the_logits_say(tiny: Model, tmp_path: Path) -> None:
    spans = continuations(tiny)
    _, logits = complete(tiny.engine("fp8"), [list(span.tokens) for span in spans], tmp_path, max_output_len=1)
    for row, span, score in zip(logits, spans, open_engine(tiny.engine("fp8")).score(spans), strict=True):
        wanted, following = row[span.begin - 1 : len(span.tokens) - 1], torch.tensor(span.tokens[span.begin :])
        direct = wanted.double().log_softmax(-1).gather(1, following[:, None]).sum().item()
        assert score.log_prob == pytest.approx(direct, abs=1e-4)
        assert score.greedy == bool((wanted.argmax(-1) == following).all())


def test_scores_equal_a_reference_that_shares_no_code_with_the_engine(tiny: Model) -> None:
    span = continuations(tiny)[0]
    direct = fp8_logits(tiny.checkpoint("fp8"), list(span.tokens[:-1])).double().log_softmax(-1)
    following = torch.tensor(span.tokens[1:])[:, None]
    (score,) = open_engine(tiny.engine("fp8")).score([span])
    assert score.log_prob == pytest.approx(direct.gather(1, following).sum().item(), abs=1e-3)


def test_scores_do_not_depend_on_the_steps_they_took(tiny: Model, tmp_path: Path) -> None:
    small = build_engine(tiny.checkpoint("fp8"), tmp_path / "engine", max_batch_size=2, max_num_tokens=5)
    for few, many in zip(*(open_engine(path).score(continuations(tiny)) for path in (small, tiny.engine("fp8"))), strict=True):
        assert few.log_prob == pytest.approx(many.log_prob, abs=1e-4) and few.greedy == many.greedy


def test_work_after_work_leaves_nothing_behind(tiny: Model, tmp_path: Path) -> None:
    prompts = tiny.prompts(8, 3)
    alone, _ = complete(tiny.engine("fp8"), prompts, tmp_path, max_output_len=6, end_id=-1)
    engine = open_engine(tiny.engine("fp8"))
    first = engine.score(continuations(tiny))
    for _ in range(2):
        completions = engine.complete([request(7, prompts[1]), request(3, prompts[0])])
        assert [list(done.token_ids) for done in reversed(completions)] == [output.token_ids for output in alone.outputs]
        assert engine.score(continuations(tiny)) == first
        assert not engine._backend.worker._cache.tables
    engine.close()


def test_requests_come_and_go_in_an_open_engine(tiny: Model, tmp_path: Path) -> None:
    prompts = tiny.prompts(40, 3)
    alone, _ = complete(tiny.engine("fp8"), prompts, tmp_path, max_output_len=6, end_id=-1)
    engine, done = open_engine(tiny.engine("fp8")), dict[int, list[int]]()
    listeners = Listeners(on_done=lambda index, completion: done.update({index: list(completion.token_ids)}))
    for _ in range(2):
        with engine.batcher(listeners=listeners) as batcher:
            batcher.step()
            batcher.add(request(0, prompts[0]))
            batcher.step()
            batcher.add(request(1, prompts[1]))
            batcher.add(request(2, prompts[0]))
            while not batcher.idle:
                batcher.step()
            assert batcher.stats.reused_tokens == 32 and batcher.stats.blocks_in_use == 0
        assert done == {index: alone.outputs[place].token_ids for index, place in ((0, 0), (1, 1), (2, 0))}
        assert not engine._backend.worker._cache.tables


def test_a_refused_request_leaves_the_engine_as_it_was(tiny: Model, tmp_path: Path) -> None:
    prompt = tiny.prompts(60)[0]
    engine = open_engine(tiny.engine("fp8"), KvBudget(max_tokens=64))
    complaint = "Prompt 5 has 60 tokens, which with 6 of output exceeds the KV cache of 64"
    with pytest.raises(UsageError, match=complaint), engine.batcher() as batcher:
        batcher.add(request(0, prompt[:20]))
        batcher.step()
        batcher.add(request(5, prompt))
    assert not engine._backend.worker._cache.tables
    (completion,) = engine.complete([request(0, prompt[:20])])
    assert completion.finish_reason == "length"
    with pytest.raises(UsageError, match="no room for a single block of 32 tokens"):
        open_engine(tiny.engine("fp8"), KvBudget(memory_bytes=9))


def test_the_other_ranks_follow_until_the_first_one_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    said, followed = [True, True, False], []

    class Follower:
        def gather_all(self, value: object) -> list[object]:
            assert value is None
            return [said.pop(0), None]

    class Backend:
        def follow(self) -> None:
            followed.append(len(said))

    engine = object.__new__(OpenEngine)
    engine._comm, engine._backend = Follower(), Backend()  # type: ignore[assignment]
    engine.follow()
    assert (said, followed) == ([], [2, 1])


def test_an_engine_that_cannot_stay_open_is_refused(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TorchBackend", None)  # nothing may be loaded before
    engine = shutil.copytree(tiny.engine("fp8"), tmp_path / "engine")
    config = json.loads((engine / "config.json").read_text())
    (engine / "config.json").write_text(json.dumps({**config, "backend": "tensorrt_llm"}))
    with pytest.raises(RefusedError, match=r"is a TensorRT-LLM engine, .*arctic-trt build --backend torch"):
        open_engine(engine)
    with pytest.raises(RefusedError, match=r"needs 2 ranks .*mpirun -n 2"):
        open_engine(tiny.engine("tiny-tp2", tp_size=2))
    with pytest.raises(UsageError, match=r"hf/config\.json describes a Hugging Face model, not an engine"):
        open_engine(tiny.hf_dir)


@pytest.mark.parametrize("budget", [KvBudget(), KvBudget(max_tokens=BLOCK_TOKENS)], ids=["room", "room for one"])
def test_requests_come_to_an_open_engine_between_steps(tiny: Model, tmp_path: Path, budget: KvBudget) -> None:
    prompts = tiny.prompts(8, 3)
    alone, _ = complete(tiny.engine("fp8"), prompts, tmp_path, max_output_len=6, end_id=-1)
    engine, done = open_engine(tiny.engine("fp8"), budget), {}
    for _ in range(2):
        with engine.batcher(listeners=Listeners(on_done=lambda index, completion: done.update({index: completion}))) as batcher:
            batcher.add(request(0, prompts[0]))
            batcher.step()
            batcher.add(request(1, prompts[1]))
            while not batcher.idle:
                batcher.step()
        assert [list(done.pop(index).token_ids) for index in (0, 1)] == [output.token_ids for output in alone.outputs]
        assert not engine._backend.worker._cache.tables

"""What an evaluation asks of its inputs and of the machine, before it begins."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from arctic_trt.errors import ArcticTrtError, RefusedError, UsageError
from arctic_trt.model.config import parse_config
from arctic_trt.quantize.memory import MAX_DEPTH
from arctic_trt.recipes import EvaluateRecipe
from arctic_trt.report.evaluate.plan import (
    SCORED_ROWS,
    EvaluationPlan,
    estimate_disk,
    estimate_peak,
    plan_evaluation,
    plan_memory,
    work_name,
)
from tests.report.evaluate.conftest import EVALUATED, LENGTHS
from tests.support.checkpoints import FULL_SIZE, random_checkpoint, write_samples

GIB = 1 << 30
ARCTIC = parse_config(FULL_SIZE)
Plan = Callable[..., EvaluationPlan]


@pytest.fixture
def planned(checkpoints: Callable[..., Path], data: Path, tmp_path: Path) -> Plan:
    def make(**recipe: object) -> EvaluationPlan:
        given = {"path": checkpoints(tp_size=2), "data": str(data), "work_dir": tmp_path, **recipe}
        return plan_evaluation(EvaluateRecipe(**given))

    return make


def test_what_is_evaluated_and_what_it_is_held_to(planned: Plan, checkpoints: Callable[..., Path], model: Path) -> None:
    alone, of_model, both = planned(), planned(path=model), planned(against=model)
    assert alone.reference is None and alone.candidate is alone.subject and alone.subject.path == checkpoints(tp_size=2)
    assert of_model.candidate is None and of_model.reference is of_model.subject
    assert both.reference is not None and both.reference.path == model and both.subject is both.candidate
    assert both.num_tokens == sum(LENGTHS) and len(both.sources) == 2


def test_samples_are_cut_and_counted(planned: Plan) -> None:
    assert [len(sample) for sample in planned(max_seq_length=10).samples] == [10, 10, 10, 7]
    assert len(planned(num_samples=1).samples) == 1


def test_samples_that_predict_nothing(planned: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    some = write_samples(tmp_path / "some.jsonl", [[1, 2, 3], [4]])
    with caplog.at_level(logging.WARNING, "arctic_trt"):
        assert len(planned(data=str(some)).samples) == 1
    assert "1 samples of a single token predict nothing" in caplog.text
    none = write_samples(tmp_path / "none.jsonl", [[4], [5]])
    with pytest.raises(UsageError, match="no sample of two tokens"):
        planned(data=str(none))


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ({"data": "nowhere.jsonl"}, "--data nowhere.jsonl is neither a file nor one of default"),
        ({"sensitivity": True}, "--sensitivity compares an FP8 checkpoint with its original"),
        ({"memory_budget": "100MB"}, "0.09 GiB is too small: this evaluation needs"),
        ({"memory_budget": "lots"}, "--memory_budget 'lots' is not a size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(planned: Plan, recipe: dict[str, object], sentence: str) -> None:
    with pytest.raises(ArcticTrtError, match=sentence):
        planned(**recipe)


def test_sensitivity_needs_something_to_choose_from(planned: Plan, checkpoints: Callable[..., Path], model: Path) -> None:
    for path, against in ((checkpoints(qformat="full_prec", tp_size=2), model), (model, model), (checkpoints(tp_size=2),) * 2):
        with pytest.raises(UsageError, match="--sensitivity compares an FP8 checkpoint"):
            planned(path=path, against=against, sensitivity=True)
    with pytest.raises(UsageError, match=r"2 pipeline stages.*--pp_size 1"):
        planned(path=checkpoints(tp_size=2, pp_size=2), against=model, sensitivity=True)


def test_another_model_is_refused(planned: Plan, tmp_path: Path) -> None:
    other = random_checkpoint(tmp_path / "other", {**EVALUATED, "num_hidden_layers": 3})
    with pytest.raises(UsageError, match=r"has num_hidden_layers 2, .*other has 3\."):
        planned(against=other)


def test_a_disk_that_is_too_small(planned: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(RefusedError, match=r"its disk has 0\.00 GB free"):
        planned()


def test_the_work_has_a_name_of_its_own(planned: Plan, model: Path, checkpoints: Callable[..., Path]) -> None:
    same = {planned().work_dir, planned().work_dir, planned(memory_budget="4GiB").work_dir}
    others = [
        planned(against=model),
        planned(path=model),
        planned(num_samples=2),
        planned(batch_size=2),
        planned(against=model, sensitivity=True),
        planned(path=checkpoints(tp_size=1)),
    ]
    assert len(same) == 1 and len({*same, *(plan.work_dir for plan in others)}) == 1 + len(others)
    assert planned().work_dir.name == work_name(planned().fingerprint)


def test_the_default_is_the_users_cache(planned: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert planned(work_dir=None).work_dir.parent == tmp_path / "cache" / "arctic-trt"
    assert not (tmp_path / "cache").exists(), "planning writes nothing"


def memory(**changes: int):  # type: ignore[no-untyped-def] # a MemoryPlan
    given = {"tokens": 65536, "batch_tokens": 512, "lanes": 2, "sources": 2, "workers": 4, "budget_bytes": 100 * GIB}
    return plan_memory(ARCTIC, **{**given, **changes})


def test_memory_is_given_up_in_order() -> None:
    wide = memory()
    assert (wide.depth, wide.spill, wide.workers) == (MAX_DEPTH, False, 4)
    spilling = memory(budget_bytes=wide.peak_bytes - 6 * GIB)
    assert spilling.spill and spilling.workers == 4
    few = memory(budget_bytes=estimate_peak(ARCTIC, batch_tokens=512, sources=2, workers=1, depth=2))
    assert few.workers == 1 and few.spill and few.depth == 2
    with pytest.raises(RefusedError, match="Raise --memory_budget, or lower --max_seq_length"):
        memory(budget_bytes=few.peak_bytes - 1)


def test_the_whole_of_arctic_is_evaluated_on_24_gb() -> None:
    plan = memory(budget_bytes=16 * GIB, workers=2)
    assert plan.workers == 2 and plan.peak_bytes <= 16 * GIB


def test_logits_come_in_blocks_that_the_allocator_gives_back() -> None:
    assert SCORED_ROWS * ARCTIC.vocab_size * 4 > 32 << 20


def test_hidden_states_on_disk() -> None:
    rows = 65536 * 7168 * 4
    assert estimate_disk(ARCTIC, tokens=65536, lanes=2, spill=False) == 2 * 2 * rows
    assert estimate_disk(ARCTIC, tokens=65536, lanes=2, spill=True) == 5 * 2 * rows

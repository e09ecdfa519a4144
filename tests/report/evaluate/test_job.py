"""The pass of an evaluation: its numbers against whole models computed at once, and what must not change them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arctic_trt.errors import CheckpointError, RefusedError
from arctic_trt.recipes import EvaluateRecipe
from arctic_trt.report.evaluate.job import Evaluation, LayerErrors, run_evaluation
from arctic_trt.report.evaluate.lanes import CANDIDATE, REFERENCE, SITES, probe_of
from arctic_trt.report.evaluate.plan import EvaluationPlan, plan_evaluation
from arctic_trt.report.evaluate.scores import summarize
from arctic_trt.report.evaluate.sources import CheckpointSource
from tests.report.evaluate.conftest import EVALUATED, LENGTHS, Evaluate
from tests.support.checkpoints import random_ids, random_tensors
from tests.support.fp8_emulation import fp8_logits
from tests.support.jobs import tree
from tests.support.naive_forward import naive_logits

SAMPLES = random_ids(EVALUATED["vocab_size"], LENGTHS, seed=8)
CUTS = [{"tp_size": 1}, {"tp_size": 4, "moe_ep_size": 2}, {"tp_size": 2, "pp_size": 2}]


def nll_of(logits_of: Callable[[list[int]], Tensor]) -> Tensor:
    """Of every predicted token, by whole logits of whole samples, float64."""
    parts = []
    for ids in SAMPLES:
        log_p = logits_of(ids)[:-1].double().log_softmax(-1)
        parts.append(-log_p[torch.arange(len(ids) - 1), torch.tensor(ids[1:])])
    return torch.cat(parts)


def perplexity(nll: Tensor) -> float:
    return float(nll.mean().exp())


@pytest.fixture(scope="module")
def original() -> Tensor:
    """The original's NLL, one token and one expert at a time, in float64."""
    tensors = random_tensors(EVALUATED, seed=3)
    return nll_of(lambda ids: naive_logits(EVALUATED, tensors, ids))


def same(a: Evaluation, b: Evaluation) -> bool:
    """Whether all numbers are the same, to the last bit."""
    return a.layers == b.layers and all(
        a.scores[lane].nll_T.equal(b.scores[lane].nll_T) and summarize(a.scores[lane]) == summarize(b.scores[lane])
        for lane in {**a.scores, **b.scores}
    )


def test_a_model_has_the_perplexity_of_the_whole_model_at_once(evaluated: Evaluate, model: Path, original: Tensor) -> None:
    found = evaluated(model)
    assert list(found.scores) == [REFERENCE] and [layer.errors for layer in found.layers] == [{}, {}]
    nll = found.scores[REFERENCE].nll_T
    assert len(nll) == sum(LENGTHS) - len(LENGTHS)
    assert torch.allclose(nll, original, atol=1e-4), "token by token, in the samples' order"
    assert perplexity(nll) == pytest.approx(perplexity(original), rel=1e-6), "1e-4 is what was promised"


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_checkpoint_has_the_perplexity_that_its_format_means(
    evaluated: Evaluate, checkpoints: Callable[..., Path], cut: dict[str, int]
) -> None:
    directory = checkpoints(**cut)
    expected = nll_of(lambda ids: fp8_logits(directory, ids))
    found = evaluated(directory).scores[CANDIDATE].nll_T
    assert perplexity(found) == pytest.approx(perplexity(expected), rel=1e-4)
    assert (found - expected).abs().median() < 1e-4, "a sum's last bit may move an activation to the neighbouring code"


def test_the_cut_changes_nothing(evaluated: Evaluate, checkpoints: Callable[..., Path], model: Path) -> None:
    first, *others = (evaluated(checkpoints(**cut), against=model) for cut in CUTS)
    assert all(same(first, other) for other in others)


def test_the_divergence_is_that_of_the_logits(evaluated: Evaluate, checkpoints: Callable[..., Path], model: Path) -> None:
    directory, tensors = checkpoints(tp_size=1), random_tensors(EVALUATED, seed=3)
    kl, agree = [], []
    for ids in SAMPLES:
        theirs, mine = naive_logits(EVALUATED, tensors, ids)[:-1].double(), fp8_logits(directory, ids)[:-1].double()
        log_r = theirs.log_softmax(-1)
        kl.append((log_r.exp() * (log_r - mine.log_softmax(-1))).sum(-1))
        agree.append((theirs.argmax(-1) == mine.argmax(-1)).double())
    found = summarize(evaluated(directory, against=model).scores[CANDIDATE])
    assert found["kl_mean"] == pytest.approx(float(torch.cat(kl).mean()), rel=2e-3)
    assert found["top1_agreement"] == pytest.approx(float(torch.cat(agree).mean()), abs=0.03)


def test_an_unquantized_checkpoint_is_its_original(evaluated: Evaluate, checkpoints: Callable[..., Path], model: Path) -> None:
    found = evaluated(checkpoints(qformat="full_prec", tp_size=2), against=model)
    assert [layer.errors for layer in found.layers] == [{CANDIDATE: 0.0}] * 2
    assert summarize(found.scores[CANDIDATE])["kl_max"] == 0.0


def test_a_model_may_be_compared_with_a_model(evaluated: Evaluate, model: Path) -> None:
    found = evaluated(model, against=model)
    assert summarize(found.scores[CANDIDATE])["kl_max"] == 0.0 and found.layers[-1].errors == {CANDIDATE: 0.0}


def test_sites_alone_and_probes(evaluated: Evaluate, checkpoints: Callable[..., Path], model: Path) -> None:
    found = evaluated(checkpoints(tp_size=2), against=model, sensitivity=True)
    assert list(found.scores) == [REFERENCE, CANDIDATE, *SITES], "probes are not scored"
    kl = {lane: summarize(found.scores[lane])["kl_mean"] for lane in (CANDIDATE, *SITES)}
    assert all(kl[site] > 0 for site in SITES)
    assert sum(kl[site] for site in SITES) == pytest.approx(kl[CANDIDATE], rel=0.3), "small divergences add up"
    first, second = (layer.errors for layer in found.layers)
    assert all(first[site] == first[probe_of(site)] for site in SITES), "nothing has gone wrong before the first layer"
    assert all(0 < second[probe_of(site)] != second[site] for site in SITES)


@pytest.mark.parametrize("variation", [{"batch_size": 2}, {"memory_budget": "spill"}], ids=str)
def test_what_must_not_matter(
    evaluated: Evaluate, checkpoints: Callable[..., Path], model: Path, tmp_path: Path, data: Path, variation: dict[str, object]
) -> None:
    directory = checkpoints(tp_size=2)
    plain = evaluated(directory, against=model)
    if "memory_budget" in variation:
        other = run_evaluation(spilled(directory, model, data, tmp_path))
    else:
        other = evaluated(directory, against=model, **variation)
    for lane in plain.scores:
        assert torch.allclose(plain.scores[lane].nll_T, other.scores[lane].nll_T, atol=2e-2)
        assert perplexity(plain.scores[lane].nll_T) == pytest.approx(perplexity(other.scores[lane].nll_T), rel=1e-4)
    if "memory_budget" in variation:
        assert same(plain, other), "where the hidden states lie is no reason for another bit"


def spilled(directory: Path, model: Path, data: Path, tmp_path: Path) -> EvaluationPlan:
    plan = plan_evaluation(EvaluateRecipe(path=directory, against=model, data=str(data), work_dir=tmp_path / "spilled"))
    return replace(plan, memory=replace(plan.memory, spill=True))


class Stopped(Exception):  # noqa: N818 - a test's own signal
    """Raised in the middle, as an interruption is."""


def interrupt_after(layer: int) -> Callable[[LayerErrors], None]:
    def on_layer(done: LayerErrors) -> None:
        if done.layer == layer:
            raise Stopped

    return on_layer


@pytest.fixture
def plan(checkpoints: Callable[..., Path], model: Path, data: Path, tmp_path: Path) -> Callable[..., EvaluationPlan]:
    def make(**recipe: object) -> EvaluationPlan:
        given = {"path": checkpoints(tp_size=2), "against": model, "data": str(data), "work_dir": tmp_path / "work", **recipe}
        return plan_evaluation(EvaluateRecipe(**given))

    return make


@pytest.mark.parametrize("sensitivity", [False, True])
def test_an_interrupted_evaluation_goes_on(plan: Callable[..., EvaluationPlan], tmp_path: Path, sensitivity: bool) -> None:
    whole = run_evaluation(plan(sensitivity=sensitivity))
    assert list((tmp_path / "work").iterdir()) == [], "nothing stays when all is done"
    with pytest.raises(Stopped):
        run_evaluation(plan(sensitivity=sensitivity), interrupt_after(0))
    (work,) = (tmp_path / "work").iterdir()
    assert {path.suffix for path in (work / ".arctic-trt-journal").iterdir()} == {".json", ".state"}
    resumed = run_evaluation(plan(sensitivity=sensitivity))
    assert resumed.resumed_layers == 1 and same(whole, resumed) and resumed.bytes_read < whole.bytes_read
    assert list((tmp_path / "work").iterdir()) == []


def test_after_the_last_layer_only_the_scores_are_left(plan: Callable[..., EvaluationPlan], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_evaluation(plan(), interrupt_after(1))
    states = list((tmp_path / "work").glob("*/.arctic-trt-journal/*.state"))
    assert {path.name for path in states} == {"layer_0001-reference.state", "layer_0001-candidate.state"}, "the old are gone"
    assert run_evaluation(plan()).resumed_layers == 2


def test_a_failure_before_the_first_layer_leaves_nothing(
    plan: Callable[..., EvaluationPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CheckpointError("the disk is broken.")

    monkeypatch.setattr(CheckpointSource, "expert", fail)
    with pytest.raises(CheckpointError, match="the disk is broken"):
        run_evaluation(plan())
    assert not (tmp_path / "work").exists()


def test_damaged_states_are_noticed(plan: Callable[..., EvaluationPlan], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_evaluation(plan(), interrupt_after(0))
    (state,) = (tmp_path / "work").glob("*/.arctic-trt-journal/*candidate.state")
    content = bytearray(state.read_bytes())
    content[100] ^= 1
    state.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"candidate\.state has been damaged"):
        run_evaluation(plan())
    assert run_evaluation(plan()).resumed_layers == 0, "it starts over, as the message says"


def test_another_question_does_not_continue_this_one(plan: Callable[..., EvaluationPlan], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_evaluation(plan(), interrupt_after(0))
    assert run_evaluation(plan(num_samples=2)).resumed_layers == 0
    assert len(list((tmp_path / "work").iterdir())) == 1, "the interrupted one waits"
    assert run_evaluation(plan()).resumed_layers == 1


def test_two_at_once_are_refused(plan: Callable[..., EvaluationPlan]) -> None:
    def another(done: LayerErrors) -> None:
        with pytest.raises(RefusedError, match="Another process is writing"):
            run_evaluation(plan())

    run_evaluation(plan(), another)


def test_nothing_is_written_beside_the_work(
    plan: Callable[..., EvaluationPlan], checkpoints: Callable[..., Path], model: Path
) -> None:
    before = tree(checkpoints(tp_size=2)), tree(model)
    run_evaluation(plan())
    assert (tree(checkpoints(tp_size=2)), tree(model)) == before


def test_records_are_plain(plan: Callable[..., EvaluationPlan], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_evaluation(plan(), interrupt_after(0))
    (record,) = (tmp_path / "work").glob("*/.arctic-trt-journal/*.json")
    content = json.loads(record.read_text())
    assert set(content["states"]) == {REFERENCE, CANDIDATE} and content["errors"]["layer"] == 0

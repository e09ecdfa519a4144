"""lm-evaluation-harness on an engine: what it is told is what the engine's logits say, and nothing comes from a network."""

from __future__ import annotations

import json
import logging
import math
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate  # type: ignore[import-not-found]
from lm_eval.api.instance import Instance  # type: ignore[import-not-found]
from lm_eval.api.model import CachingLM  # type: ignore[import-not-found]
from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.runtime.harness import ArcticTrtLM, plan_continuation, plan_generation
from arctic_trt.runtime.runner import RunOptions, run
from arctic_trt.runtime.sampler import Sampling
from tests.runtime.conftest import Model
from tests.support.engines import Job, complete, mpirun
from tests.support.harness_tasks import DIRECTORY, NAMES, rows, task

TEXT = "the sea is there. " * 5


@pytest.fixture(scope="module", autouse=True)
def no_network() -> Iterator[None]:
    def connect(self: socket.socket, address: object) -> None:
        raise AssertionError(f"a test asks for {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(autouse=True)
def engines() -> Iterator[None]:
    yield
    ArcticTrtLM.engines.close()


@pytest.fixture(scope="session")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data_sets")


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [Instance(kind, {}, item, index) for index, item in enumerate(arguments)]


def logits_of(model: Model, ids: Sequence[int], tmp_path: Path) -> torch.Tensor:
    """Log-probabilities [tokens, vocab] after each of ``ids``, computed apart from all that is tested here."""
    _, logits = complete(model.engine("fp8"), [list(ids)], tmp_path, max_output_len=1)
    return logits[0].double().log_softmax(-1)


def open_model(model: Model, **arguments: Any) -> Any:
    return ArcticTrtLM(str(model.engine("fp8")), **arguments)


def evaluate(model: Model, data_sets: Path, names: Sequence[str], **options: Any) -> dict[str, Any]:
    changes = options.pop("changes", {})
    return simple_evaluate(  # type: ignore[no-any-return]
        model="arctic_trt",
        model_args={"engine_dir": str(model.engine("fp8"))},
        tasks=[task(name, data_sets, **changes) for name in names],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        **options,
    )


# --- which tokens a text becomes


def test_a_text_begins_as_the_tokenizer_begins_it(tiny: Model) -> None:
    lm = open_model(tiny)
    assert lm.tok_encode("the sea")[0] == lm.prefix_token_id == 1
    assert lm.tok_encode("the sea", add_special_tokens=False) == lm.tok_encode("the sea")[1:]
    assert lm.tok_encode("<s>the sea") == lm.tok_encode("the sea")
    chat = lm.apply_chat_template([{"role": "user", "content": "a"}])
    assert lm.tok_encode(chat)[0] == lm.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert open_model(tiny, add_bos_token=False).tok_encode("the sea") == lm.tok_encode("the sea")[1:]
    assert open_model(tiny, prefix_token_id=9).prefix_token_id == 9


def test_spaces_between_context_and_continuation_belong_to_the_continuation(tiny: Model, tmp_path: Path) -> None:
    lm = open_model(tiny)
    found = lm.loglikelihood(requests("loglikelihood", ("the sea", " is the"), ("the sea ", "is the"), ("", "the sea")), True)
    assert found[0] == found[1]
    whole, context = lm.tok_encode("the sea is the"), lm.tok_encode("the sea")
    table = logits_of(tiny, whole, tmp_path)
    pairs = range(len(context), len(whole))
    assert found[0][0] == pytest.approx(sum(float(table[at - 1, whole[at]]) for at in pairs), abs=1e-4)
    assert found[2][0] == pytest.approx(sum(float(table[at - 1, context[at]]) for at in range(1, len(context))), abs=1e-4)


def test_is_greedy_is_whether_the_engine_would_have_said_it(tiny: Model) -> None:
    lm = open_model(tiny)
    context = lm.tok_encode("the sea")
    result = run(RunOptions(engine_dir=tiny.engine("fp8"), max_output_len=4, input_text=("the sea",), end_id=-1))
    assert result is not None
    said = result.outputs[0].token_ids
    other = [*said[:-1], said[-1] + 1]
    assert [greedy for _, greedy in lm._loglikelihood_tokens([(None, context, said), (None, context, other)], True)] == [
        True,
        False,
    ]


# --- what is too long


def test_a_context_is_cut_at_its_beginning(tiny: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lm = open_model(tiny, max_length=20)
    context, text = tiny.prompts(40, 6)
    with caplog.at_level(logging.WARNING, "arctic_trt"):
        (long, _), (short, _) = lm._loglikelihood_tokens([(None, context, text), (None, context[-15:], text)], True)
    assert "1 of 2 requests do not fit into 20 tokens: their beginnings are left out." in caplog.text
    assert long == short
    table = logits_of(tiny, [*context[-15:], *text], tmp_path)
    assert long == pytest.approx(sum(float(table[14 + at, token]) for at, token in enumerate(text)), abs=1e-4)


def test_continuations_that_cannot_be_scored() -> None:
    assert plan_continuation("", [1, 2], [3, 4], 3).tokens == (1, 2, 3, 4)
    cut = plan_continuation("", [1, 2], [3, 4], 2)
    assert (cut.tokens, cut.begin) == ((2, 3, 4), 1)
    with pytest.raises(UsageError, match=r"The continuation of \('a', 'b'\) has 3 tokens, expected 1 to 2"):
        plan_continuation(("a", "b"), [1], [3, 4, 5], 2)
    with pytest.raises(UsageError, match="has 0 tokens, expected 1 to 2"):
        plan_continuation("", [1], [], 2)


@pytest.mark.parametrize("max_length", [None, 8])
def test_perplexity_is_the_mean_over_the_same_tokens(tiny: Model, tmp_path: Path, max_length: int | None) -> None:
    lm = open_model(tiny, max_length=max_length)
    texts = (TEXT, "", "<s>a")
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)), True)
    ids = lm.tok_encode(TEXT)
    size = max_length or len(ids)
    direct = 0.0
    for begin in range(1, len(ids), size):  # the last window reaches back, so that it is full too
        end = min(begin + size, len(ids))
        window = ids[max(0, end - 1 - size) : end - 1]
        table = logits_of(tiny, window, tmp_path)
        direct += sum(float(table[at - end, ids[at]]) for at in range(begin, end))
    assert len(ids) > 40
    assert math.exp(-found[0] / (len(ids) - 1)) == pytest.approx(math.exp(-direct / (len(ids) - 1)), rel=1e-5)
    assert found[1] == 0
    after_begin = logits_of(tiny, [1], tmp_path)[0]
    assert found[2] == pytest.approx(float(after_begin[lm.tok_encode("a")[1]]), abs=1e-4)


# --- generation


def test_texts_are_the_engine_s_own_up_to_the_stop_word(tiny: Model) -> None:
    lm, contexts = open_model(tiny), ("the sea", "a", "the sea is there", "")
    options = {"engine_dir": tiny.engine("fp8"), "max_output_len": 12}
    result = run(RunOptions(input_text=contexts[:3], **options))
    assert result is not None
    whole = [output.text for output in result.outputs]
    letter = whole[0][len(whole[0]) // 2]
    found = lm.generate_until(
        requests(
            "generate_until",
            *((text, {"until": [], "max_gen_toks": 12}) for text in contexts),
            (contexts[0], {"until": [letter], "max_gen_toks": 12}),
            (contexts[0], {"until": "<|im_end|>", "max_new_tokens": 12, "do_sample": False, "temperature": 0.0}),
        ),
        True,
    )
    assert found[:3] == whole and found[3]
    assert found[4] == whole[0].split(letter)[0]
    assert found[5] == whole[0]


def test_drawn_texts_follow_the_seed_and_not_the_company(tiny: Model) -> None:
    asked = {"until": ["absent"], "max_gen_toks": 10, "do_sample": True, "temperature": 1.5, "top_p": 0.9}
    both = requests("generate_until", ("the sea", asked), ("the sea", asked), ("a", {"max_gen_toks": 2}))
    first = open_model(tiny, seed=5).generate_until(both, True)
    assert first[0] != first[1]
    assert open_model(tiny, seed=5).generate_until(both, True) == first
    assert open_model(tiny, seed=5).generate_until(both[:1], True) == first[:1]
    assert open_model(tiny, seed=6).generate_until(both, True) != first


def test_a_prompt_is_cut_where_there_is_no_room(tiny: Model, caplog: pytest.LogCaptureFixture) -> None:
    lm = open_model(tiny, max_length=30)
    with caplog.at_level(logging.WARNING, "arctic_trt"):
        (found,) = lm.generate_until(requests("generate_until", (TEXT, {"max_gen_toks": 10})), True)
    assert found and "1 of 1 requests do not fit into 30 tokens" in caplog.text
    with pytest.raises(UsageError, match="max_gen_toks=30 leaves no room for a prompt in 30 tokens"):
        lm.generate_until(requests("generate_until", ("a", {"max_gen_toks": 30})), True)


def test_a_tokenizer_of_another_model_is_noticed(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = open_model(tiny)
    monkeypatch.setattr(lm._engine, "vocab_size", 270)
    for ask in (
        lambda: lm.generate_until(requests("generate_until", ("a", {}), ("the sea", {})), True),
        lambda: lm.loglikelihood(requests("loglikelihood", ("a", " the sea")), True),
    ):
        with pytest.raises(UsageError, match=r"has token id \d+, expected 0 to 269"):
            ask()


@pytest.mark.parametrize(
    ("asked", "sampling"),
    [
        ({}, Sampling(seed=4)),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "num_beams": 1}, Sampling(seed=4)),
        ({"temperature": 0.7}, Sampling(temperature=0.7, seed=4)),
        ({"do_sample": True}, Sampling(temperature=1.0, seed=4)),
        ({"do_sample": True, "min_p": 0.2}, Sampling(temperature=1.0, min_p=0.2, seed=4)),
        ({"do_sample": True, "top_p": 0.9, "top_k": 3}, Sampling(temperature=1.0, top_p=0.9, top_k=3, seed=4)),
        ({"repetition_penalty": 1.2}, Sampling(repetition_penalty=1.2, seed=4)),
    ],
)
def test_how_a_task_generates(asked: dict[str, Any], sampling: Sampling) -> None:
    plan = plan_generation({"until": ["a", ""], **asked}, 7, seed=4)
    assert (plan.until, plan.max_new_tokens, plan.sampling) == (("a",), 7, sampling)
    assert plan.sampling.greedy == (not plan_generation({"until": ["a"], **asked}, 7, seed=4).sampling.temperature)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"num_beams": 4}, "generation_kwargs has num_beams=4, which the engine cannot do. It knows until"),
        ({"epsilon_cutoff": 0.1, "typical_p": 0.2}, "has epsilon_cutoff=0.1, typical_p=0.2"),
        ({"max_gen_toks": 0}, "has max_gen_toks=0"),
        ({"until": [3]}, r"has until=\[3\]"),
        ({"temperature": 0.5, "top_p": 3.0}, "--top_p 3.0 is out of range"),
    ],
)
def test_what_the_engine_does_not_do_is_refused(asked: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        plan_generation(asked, 7, seed=0)


# --- what the harness is told besides


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"engine_dir": None}, "--model_args has no engine_dir, expected engine_dir, and perhaps tokenizer_dir"),
        ({"colour": "red", "pretrained": "x"}, "--model_args has colour, pretrained, expected"),
        ({"tokenizer_dir": "/absent"}, r"/absent/tokenizer\.json does not exist"),
        ({"max_length": 257}, "max_length=257 is out of range, expected 2 to 256"),
        ({"max_length": 1}, "max_length=1 is out of range"),
    ],
)
def test_model_arguments_that_do_not_fit(tiny: Model, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        ArcticTrtLM(**{"engine_dir": str(tiny.engine("fp8")), **arguments})


def test_a_batch_size_is_the_engine_s_business(tiny: Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "arctic_trt"):
        open_model(tiny, batch_size=1)
        open_model(tiny, batch_size="auto")
        assert not caplog.text
        open_model(tiny, batch_size=16)
    assert "--batch_size: without effect" in caplog.text


@pytest.mark.parametrize(
    ("asked", "opened"), [(None, "auto"), ("cuda:0", "auto"), ("auto", "auto"), ("cpu", "cpu"), ("cuda", "cuda")]
)
def test_the_device_is_the_engine_s(asked: str | None, opened: str, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself says ``cuda:0`` when nobody has said anything."""
    devices = []

    def refuse(engine_dir: Path, *, device: str) -> None:
        devices.append(device)
        raise RefusedError("far enough.")

    monkeypatch.setattr("arctic_trt.runtime.harness.open_engine", refuse)
    with pytest.raises(RefusedError, match="far enough"):
        open_model(tiny, device=asked)
    assert devices == [opened]


@pytest.mark.parametrize("asked", ["mps", "cuda:1", "0"])
def test_a_device_that_ranks_do_not_take(asked: str, tiny: Model) -> None:
    with pytest.raises(UsageError, match=f"--device {asked} is none of auto, cpu, cuda"):
        open_model(tiny, device=asked)


def test_the_tokenizer_s_name_depends_on_the_template(tiny: Model) -> None:
    lm = open_model(tiny)
    before = lm.tokenizer_name
    assert re.fullmatch("arctic_trt-[0-9a-f]{16}", before)
    assert lm.chat_template(True) == lm.tokenizer.chat_template
    lm.tokenizer.chat_template += " "
    assert lm.tokenizer_name != before


def test_what_is_in_the_cache_is_not_asked_again(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = open_model(tiny)
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    asked = {
        "loglikelihood": requests("loglikelihood", ("the sea", " is"), ("a", " the sea"), ("the sea", " a")),
        "loglikelihood_rolling": requests("loglikelihood_rolling", (TEXT,), ("a",)),
        "generate_until": requests("generate_until", ("the sea", {"max_gen_toks": 4}), ("a", {"max_gen_toks": 3})),
    }
    kept: list[str] = []
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda kind, key, value: kept.append(f"{kind} {len(key)}"))
    first = {kind: getattr(cached, kind)(items) for kind, items in asked.items()}
    assert kept == ["loglikelihood 2"] * 3 + ["loglikelihood_rolling 1"] * 2 + ["generate_until 2"] * 2
    monkeypatch.setattr(lm, "_engine", None)
    assert {kind: getattr(cached, kind)(items) for kind, items in asked.items()} == first


# --- the harness itself


@pytest.fixture(scope="module")
def results(tiny: Model, data_sets: Path) -> dict[str, Any]:
    return evaluate(tiny, data_sets, NAMES)


def responses(samples: Sequence[dict[str, Any]]) -> list[Any]:
    return [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def test_the_three_kinds_of_task(tiny: Model, results: dict[str, Any]) -> None:
    found, lm = results["results"], open_model(tiny)
    right = 0
    for row, choices in zip(rows("choice"), responses(results["samples"]["arctic_choice"]), strict=True):
        pairs = requests("loglikelihood", *((row["question"], f" {choice}") for choice in row["choices"]))
        scores = [lm.loglikelihood([pair], True)[0] for pair in pairs]
        assert [score for ((score, _),) in choices] == pytest.approx([score for score, _ in scores], abs=1e-4)
        right += max(range(len(scores)), key=lambda index: scores[index]) == row["answer"]
    assert found["arctic_choice"]["acc,none"] == right / len(rows("choice"))
    texts = [row["text"] for row in rows("text")]
    total = sum(lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)), True))
    size = sum(len(text.encode()) for text in texts)
    assert found["arctic_text"]["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-6)
    assert max(len(lm.tok_encode(text)) for text in texts) > lm.max_length
    said = run(
        RunOptions(engine_dir=tiny.engine("fp8"), max_output_len=24, input_text=("The future of AI is",), stop_words=(".",))
    )
    assert said is not None
    assert responses(results["samples"]["arctic_answer"])[0] == [[said.outputs[0].text]]
    assert results["eot_token_id"] == 4 and results["max_length"] == 256


def test_a_chat_with_examples_as_turns(tiny: Model, data_sets: Path) -> None:
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 1, "limit": 1}
    found = evaluate(tiny, data_sets, ["choice"], changes={"fewshot_config": {"sampler": "first_n"}}, **options)
    (sample,) = found["samples"]["arctic_choice"]
    prompt = sample["arguments"][0][0]
    example, asked = rows("choice")[1 if sample["doc_id"] == 0 else 0], rows("choice")[sample["doc_id"]]
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n|$)", prompt, re.DOTALL)
    assert [role for role, _ in turns] == ["user", "assistant", "user", "assistant"]
    assert turns[2:] == [("user", asked["question"]), ("assistant", "")]
    assert turns[0][1] in {row["question"] for row in rows("choice")} and example
    lm = open_model(tiny)
    answer = lm.loglikelihood(requests("loglikelihood", sample["arguments"][0]), True)[0]
    assert sample["resps"][0][0][0] == pytest.approx(answer[0], abs=1e-4)


def harness_job(ranks: int, tmp_path: Path, *words: object) -> Job:
    environ = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return mpirun(ranks, "-m", "tests.support.few_tasks", *words, timeout_s=100, **environ)


@pytest.mark.mpi
def test_four_ranks_tell_the_same(tiny: Model, results: dict[str, Any], tmp_path: Path) -> None:
    engine = tiny.engine("tiny-tp4", tp_size=4)
    words = ["arctic_trt", "lm_eval", "--model", "arctic_trt", "--model_args", f"engine_dir={engine},tokenizer_dir={tiny.hf_dir}"]
    words += ["--tasks", ",".join(str(DIRECTORY / f"{name}.yaml") for name in NAMES), "--output_path", tmp_path, "--log_samples"]
    job = harness_job(4, tmp_path, *words)
    assert job.code == 0, job.err
    assert job.out.count("|arctic_choice|") == job.out.count("|arctic_text  |") == 1
    for name in NAMES:
        (file,) = tmp_path.rglob(f"samples_arctic_{name}_*.jsonl")
        found = responses([json.loads(line) for line in file.read_text().splitlines()])
        assert numbers(found) == pytest.approx(numbers(responses(results["samples"][f"arctic_{name}"])), abs=1e-4)
        if name == "answer":
            assert found == responses(results["samples"]["arctic_answer"])


def numbers(value: Any) -> list[float]:
    """All numbers in nested lists, in their order; the harness writes numbers, True and False as text."""
    if isinstance(value, list | tuple):
        return [number for item in value for number in numbers(item)]
    try:
        return [float({"True": True, "False": False}.get(value, value))]
    except ValueError:
        return []


@pytest.mark.mpi
def test_a_rank_that_fails_ends_the_job(tiny: Model, tmp_path: Path) -> None:
    engine = tiny.engine("tiny-tp2", tp_size=2)
    words = ["tests.support.faulty_run", "raise", "1", "lm_eval", "--model", "arctic_trt", "--model_args", f"engine_dir={engine}"]
    words += ["--tasks", DIRECTORY / "answer.yaml"]
    job = harness_job(2, tmp_path, *words)
    assert (job.code, job.out) == (1, "")
    assert re.findall(r"arctic-trt: error: (.*)", job.err) == [
        "rank 1: Unexpected ValueError: the fault of this test (-v shows where)."
    ]

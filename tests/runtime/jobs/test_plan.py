"""From lines to requests: what a line says goes over what the command line says, and what does not fit is named by field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arctic_trt.engine.config import BuildConfig
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.jobs.input_file import Shard
from arctic_trt.runtime.jobs.lines import LineError, parse_line
from arctic_trt.runtime.jobs.plan import Defaults, Planner, in_fields, job_settings
from arctic_trt.runtime.requests import Request, word_ids
from arctic_trt.runtime.sampler import Sampling
from tests.support.small_tokenizer import write_tokenizer

LIMITS = BuildConfig(max_batch_size=4, max_input_len=40, max_seq_len=50, max_num_tokens=64, max_beam_width=1)
DEFAULTS = Defaults(
    max_output_len=9, sampling={"temperature": 0.5, "top_k": 7, "seed": None}, end_ids=(4, 2), stop_words=("end",)
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def plan(
    line: dict[str, Any], tokenizer: Tokenizer | None = None, defaults: Defaults = DEFAULTS, number: int = 1
) -> list[Request]:
    planner = Planner(limits=LIMITS, vocab_size=400, tokenizer=tokenizer, defaults=defaults)
    return planner.requests(parse_line(line, number))


def test_a_line_goes_over_the_command_line(tokenizer: Tokenizer) -> None:
    (plain,) = plan({"prompt": "the sea"}, tokenizer)
    assert plain.prompt == tuple(tokenizer.encode("the sea"))
    assert (plain.max_new_tokens, plain.stop_words, plain.end_ids) == (9, ("end",), {4, 2})
    assert plain.sampling == Sampling(temperature=0.5, top_k=7)
    line = {"prompt": "the sea", "max_tokens": 3, "temperature": 0, "seed": 8, "stop": ["a", "b"]}
    (own,) = plan(line, tokenizer)
    assert (own.max_new_tokens, own.stop_words, own.end_ids) == (3, ("a", "b"), {4, 2})
    assert own.sampling == Sampling(temperature=0.0, top_k=7, seed=8)
    assert plan({"prompt": "the sea", "stop": []}, tokenizer)[0].stop_words == ()


def test_penalties_and_bad_words_of_a_line(tokenizer: Tokenizer) -> None:
    defaults = Defaults(sampling={"min_p": 0.5, "presence_penalty": 1.0}, bad_words=("sea",))
    (plain,) = plan({"prompt": [1]}, tokenizer, defaults)
    assert plain.sampling == Sampling(min_p=0.5, presence_penalty=1.0)
    assert plain.bad_words == word_ids(["sea"], tokenizer) != ()
    line = {"prompt": [1], "min_p": 0.1, "presence_penalty": 0, "frequency_penalty": -1, "bad_words": ["is", "the"]}
    (own,) = plan(line, tokenizer, defaults)
    assert own.sampling == Sampling(min_p=0.1, frequency_penalty=-1.0)
    assert own.bad_words == word_ids(["is", "the"], tokenizer)
    assert plan({"prompt": [1], "bad_words": []}, tokenizer, defaults)[0].bad_words == ()


def test_without_a_length_the_engine_s_is_the_limit() -> None:
    assert plan({"prompt": [1, 2, 3]}, defaults=Defaults())[0].max_new_tokens == 47
    limits = {"max_input_len": 50}
    planner = Planner(limits=BuildConfig(**{**vars_of(LIMITS), **limits}), vocab_size=9, tokenizer=None, defaults=Defaults())
    with pytest.raises(LineError, match="The prompt has 50 tokens, which with max_tokens 1 exceeds"):
        planner.requests(parse_line({"prompt": [1] * 50}, 1))


def vars_of(limits: BuildConfig) -> dict[str, int]:
    return {name: getattr(limits, name) for name in limits.__slots__}


def test_chats_and_texts_under_the_template(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "the sea"}]
    expected = tuple(tokenizer.encode_chat(messages, reply=True))
    assert plan({"messages": messages}, tokenizer)[0].prompt == expected
    chat = Defaults(chat=True)
    assert plan({"prompt": "the sea"}, tokenizer, chat)[0].prompt == expected
    assert plan({"prompt": [5, 6]}, tokenizer, chat)[0].prompt == (5, 6)


def test_each_choice_has_an_index_that_only_its_place_decides() -> None:
    requests = plan({"prompt": [1], "n": 3}, defaults=Defaults(), number=5)
    assert [request.index for request in requests] == [512, 513, 514]
    assert plan({"prompt": [1]}, defaults=Defaults(), number=6)[0].index == 640
    assert plan({"prompt": [1]}, defaults=Defaults(), number=2**24 + 1)[0].index == 0, "indices are int32 between ranks"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"prompt": "x"}, "The prompt is text, which needs a tokenizer. Give --tokenizer_dir."),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"prompt": [1], "stop": "x"}, "stop needs a tokenizer. Give --tokenizer_dir."),
        ({"prompt": []}, "The prompt is empty."),
        ({"prompt": [400]}, "The prompt has token id 400, expected 0 to 399."),
        ({"prompt": [-1]}, "The prompt has token id -1"),
        ({"prompt": [1] * 41}, "The prompt has 41 tokens, the engine was built for --max_input_len 40."),
        ({"prompt": [1] * 40, "max_tokens": 11}, "which with max_tokens 11 exceeds the engine's --max_seq_len 50. At most 10"),
        ({"prompt": [1], "temperature": -1}, "temperature -1.0 is out of range, expected a finite number, 0 or more."),
        ({"prompt": [1], "bad_words": "x"}, "bad_words needs a tokenizer. Give --tokenizer_dir."),
        ({"prompt": [1], "presence_penalty": 3}, "presence_penalty 3.0 is out of range, expected between -2 and 2"),
        ({"prompt": [1], "top_p": 2}, "top_p 2.0 is out of range"),
        ({"prompt": [1], "repetition_penalty": 0}, "repetition_penalty 0.0 is out of range"),
        ({"prompt": [1], "seed": -1}, "seed -1 is out of range"),
    ],
)
def test_what_the_engine_cannot_do_is_named_by_field(line: dict[str, Any], complaint: str) -> None:
    with pytest.raises(LineError) as caught:
        plan(line, defaults=Defaults())
    assert caught.value.code == "invalid_request"
    if "messages" not in line:
        assert complaint in caught.value.message


def test_messages_that_the_template_refuses(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer.hf, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(LineError, match=r"The messages do not fit the chat template of .*: roles must alternate\."):
        plan({"messages": [{"role": "user", "content": "x"}]}, tokenizer)
    monkeypatch.setattr(tokenizer.hf, "chat_template", None)
    with pytest.raises(LineError, match="has no chat_template"):
        plan({"messages": [{"role": "user", "content": "x"}]}, tokenizer)


def test_flags_become_fields() -> None:
    assert in_fields("--random_seed 3, --top_k 4, --tokenizer_dir x") == "seed 3, top_k 4, --tokenizer_dir x"


def test_settings_follow_what_results_depend_on(tmp_path: Path) -> None:
    engine_dir, tokenizer_dir = tmp_path / "engine", write_tokenizer(tmp_path / "tokenizer")
    (engine_dir / "report").mkdir(parents=True)

    def settings(config: str = "c", defaults: Defaults = DEFAULTS, shard: Shard = Shard(0, 2)) -> dict[str, Any]:  # noqa: B008
        return job_settings(engine_dir, {"config": config}, tokenizer_dir, defaults, shard)

    before = settings()
    assert (before["shard"], before["temperature"], before["max_output_len"], before["end_ids"]) == ("0/2", 0.5, 9, [4, 2])
    assert "seed" not in before and settings() == before
    assert settings(config="d")["engine"] != before["engine"]
    (engine_dir / "report" / "digests.json").write_text("{}")
    assert settings()["engine"] != before["engine"] and settings()["tokenizer"] == before["tokenizer"]
    (tokenizer_dir / "generation_config.json").write_text("{}")
    assert settings()["tokenizer"] != before["tokenizer"]


def test_logprobs_are_asked_for() -> None:
    assert [
        plan({"prompt": [1], **asked}, defaults=Defaults())[0].logprobs for asked in ({}, {"logprobs": 3}, {"logprobs": True})
    ] == [None, 3, 0]


def test_a_seed_of_the_line_s_own_draws_the_same_wherever_it_stands() -> None:
    def streams(number: int, **asked: Any) -> list[int | None]:
        return [request.stream for request in plan({"prompt": [1], "n": 2, **asked}, defaults=Defaults(), number=number)]

    assert streams(3, seed=7) == streams(900, seed=7) == [0, 1]
    assert streams(3) == [None, None]
    assert plan({"prompt": [1]}, defaults=Defaults(), number=3)[0].index != 0

"""Completions: when they end, what they say, and that company changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from arctic_trt.engine.config import BuildConfig
from arctic_trt.errors import ArcticTrtError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.batcher import Batcher, generate
from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.completion import Completion, Listeners
from arctic_trt.runtime.detokenizer import Detokenizer, settled_ids
from arctic_trt.runtime.outcome import Logits
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.sampler import Sampling
from arctic_trt.runtime.step import Step
from tests.runtime.conftest import Model
from tests.support.engines import build_engine, complete
from tests.support.small_tokenizer import write_tokenizer

LIMITS = BuildConfig(max_batch_size=2, max_input_len=50, max_seq_len=99, max_num_tokens=8, max_beam_width=1)
VOCABULARY = 400


def counting(step: Step) -> Logits:
    """An engine whose likeliest next token is always the last one plus one."""
    rows = [token + 1 for chunk in step.chunks for token in chunk.tokens[chunk.logits_from :]]
    return Logits(torch.nn.functional.one_hot(torch.tensor(rows, dtype=torch.int64), VOCABULARY).float() * 50)


def request(index: int, *prompt: int, output: int = 5, **options: object) -> Request:
    return Request(index=index, prompt=prompt, max_new_tokens=output, **{"sampling": Sampling(), **options})  # type: ignore[arg-type]


def test_completions_come_in_the_order_of_the_requests() -> None:
    requests = [request(0, 5, 9, output=6), request(1, 20, output=1), request(2, *range(30, 50), output=3)]
    assert generate(counting, requests, LIMITS) == [
        Completion(prompt=(5, 9), token_ids=(10, 11, 12, 13, 14, 15), text="", finish_reason="length"),
        Completion(prompt=(20,), token_ids=(21,), text="", finish_reason="length"),
        Completion(prompt=tuple(range(30, 50)), token_ids=(50, 51, 52), text="", finish_reason="length"),
    ]


def test_an_end_id_ends_a_sequence_and_is_its_last_token() -> None:
    requests = [request(0, 5, end_ids=frozenset({8, 77})), request(1, 5)]
    first, second = generate(counting, requests, LIMITS)
    assert (first.token_ids, first.finish_reason) == ((6, 7, 8), "stop")
    assert (second.token_ids, second.finish_reason) == ((6, 7, 8, 9, 10), "length")


def test_prompt_logits_are_all_there() -> None:
    seen: dict[tuple[int, int], float] = {}

    def keep(index: int, start: int, logits_WV: Tensor) -> None:
        for offset, row in enumerate(logits_WV):
            assert (index, start + offset) not in seen
            seen[index, start + offset] = int(row.argmax())

    requests = [request(0, *range(10, 31), prompt_logits=True), request(1, 40, 60, prompt_logits=True)]
    generate(counting, requests, LIMITS, listeners=Listeners(on_prompt_logits=keep))
    assert seen == {**{(0, i): 11 + i for i in range(21)}, (1, 0): 41, (1, 1): 61}


def test_logits_that_are_not_finite_are_an_error_that_names_the_prompt() -> None:
    def broken(step: Step) -> Logits:
        logits_WV = counting(step).logits()
        for row, chunk in enumerate(step.chunks):
            if chunk.sequence == 1 and chunk.start > 2:
                logits_WV[row, 7] = torch.nan
        return Logits(logits_WV)

    with pytest.raises(ArcticTrtError, match="logits of prompt 1 at position 3 are not finite"):
        generate(broken, [request(0, 1), request(1, 5, 6)], LIMITS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def tell(tokenizer: Tokenizer, text: str, *stop_words: str) -> tuple[Completion, list[str]]:
    """Have an engine say ``text``, whatever the prompt is."""
    ids, pieces = tokenizer.encode(text)[1:], []

    def saying(step: Step) -> Logits:
        at = step.chunks[0].start + len(step.chunks[0].tokens) - 1
        return Logits(torch.nn.functional.one_hot(torch.tensor([ids[at] if at < len(ids) else 4]), VOCABULARY).float())

    (completion,) = generate(
        saying,
        [request(0, 1, output=40, end_ids=frozenset({4}), stop_words=stop_words)],
        LIMITS,
        detokenizer=lambda: Detokenizer(tokenizer.decode, settled_ids(tokenizer)),
        listeners=Listeners(on_piece=lambda index, piece: pieces.append(piece)),
    )
    return completion, pieces


@pytest.mark.parametrize("text", ["the end", "a 🦀 is", "é", "a\nb"])
def test_text_is_the_decoded_tokens_and_streams_in_pieces(tokenizer: Tokenizer, text: str) -> None:
    completion, pieces = tell(tokenizer, text)
    assert completion.text == text == "".join(pieces) == tokenizer.decode(list(completion.token_ids))
    assert completion.finish_reason == "stop" and completion.token_ids[-1] == 4
    assert "" not in pieces


@pytest.mark.parametrize(
    ("word", "text", "tokens_saved"),
    [(" is", "the sea", True), ("\n", "the sea is", True), ("absent", "the sea is\nthe end", False), ("he", "t", True)],
)
def test_stop_words_are_not_part_of_the_text(tokenizer: Tokenizer, word: str, text: str, tokens_saved: bool) -> None:
    completion, pieces = tell(tokenizer, "the sea is\nthe end", word)
    assert completion.text == text == "".join(pieces)
    assert completion.finish_reason == "stop"
    assert (completion.token_ids[-1] != 4) == tokens_saved


EVERYTHING = Sampling(
    temperature=1.0, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.2, frequency_penalty=0.1, seed=3
)


@pytest.mark.parametrize("sampling", [Sampling(), EVERYTHING])
@pytest.mark.parametrize("limits", [{}, {"max_batch_size": 2}, {"max_num_tokens": 7}])
def test_company_changes_nothing(tiny: Model, tmp_path: Path, sampling: Sampling, limits: dict[str, int]) -> None:
    prompts = tiny.prompts(13, 1, 30, 4)
    engine = build_engine(tiny.checkpoint("fp8"), tmp_path / "engine", **limits)
    (together, _) = complete(engine, prompts, tmp_path, sampling=sampling, end_id=-1, logprobs=2)
    for index in range(len(prompts)):
        # the same place among the prompts, so that it draws from the same generator
        others = [prompt if i == index else [1] for i, prompt in enumerate(prompts)]
        (apart, _) = complete(engine, others, tmp_path, sampling=sampling, end_id=-1, logprobs=2)
        assert apart.outputs[index] == together.outputs[index]


def test_samples_of_one_prompt_end_at_stop_words_of_their_own(tokenizer: Tokenizer) -> None:
    """The word comes in pieces, which the three sequences get by turns."""
    ids = tokenizer.encode("the sea is the sky")[1:]
    after = [ids, ids[2:], [*ids[:2], *ids[:2]]]

    def saying(step: Step) -> Logits:
        rows = [after[chunk.sequence][min(chunk.start + len(chunk.tokens) - 1, 3)] for chunk in step.chunks if chunk.num_logits]
        return Logits(torch.nn.functional.one_hot(torch.tensor(rows), VOCABULARY).float() * 100)

    asked = [request(i, 1, output=4, stop_words=("ea is",), sampling=Sampling(temperature=0.1), logprobs=1) for i in range(3)]
    completions = generate(saying, asked, LIMITS, detokenizer=lambda: Detokenizer(tokenizer.decode, settled_ids(tokenizer)))
    texts = [tokenizer.decode(tokens[:4]) for tokens in after]
    assert [completion.text for completion in completions] == [text.partition("ea is")[0] for text in texts]
    stopped = ["ea is" in text for text in texts]
    assert any(stopped) and not all(stopped)
    assert [completion.finish_reason == "stop" for completion in completions] == stopped
    for completion in completions:
        assert completion.logprobs is not None
        assert tuple(one.token for one in completion.logprobs) == completion.token_ids


def test_bad_words_and_logprobs_of_a_completion() -> None:
    [forbidden] = generate(counting, [request(0, 5, output=3, bad_words=((8,), (6, 7)), logprobs=1)], LIMITS)
    assert forbidden.token_ids == (6, 0, 1), "7 may not follow 6, and what is left is all alike"
    assert forbidden.logprobs is not None
    assert [one.top[0][0] for one in forbidden.logprobs] == [6, 7, 1]
    assert [one.logprob for one in forbidden.logprobs] == pytest.approx([0, -50, 0], abs=1e-4)
    [silent] = generate(counting, [request(0, 5)], LIMITS)
    assert silent.logprobs is None


def test_a_preempted_sequence_goes_on_as_if_nothing_had_been() -> None:
    """What is kept for penalties and random numbers is not computed again."""
    asked = [request(i, 7 + i, output=40, sampling=EVERYTHING, logprobs=1) for i in range(2)]
    noisy = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 3
    done: dict[int, Completion] = {}

    def execute(step: Step) -> Logits:
        return Logits(noisy[[token for chunk in step.chunks for token in chunk.tokens[chunk.logits_from :]]])

    listeners = Listeners(on_done=lambda index, completion: done.update({index: completion}))
    narrow = Batcher(execute, LIMITS, room=KvRoom(12, block_tokens=4), listeners=listeners)
    for one in asked:
        narrow.add(one)
    while not narrow.idle:
        narrow.step()
    assert narrow.stats.preemptions and [done[0], done[1]] == generate(execute, asked, LIMITS)


def test_requests_come_and_go_between_steps() -> None:
    told: list[tuple[int, object]] = []
    listeners = Listeners(
        on_token=lambda index, token: told.append((index, token)),
        on_done=lambda index, completion: told.append((index, completion.finish_reason)),
    )
    batcher = Batcher(counting, LIMITS, listeners=listeners)
    assert batcher.idle
    batcher.step()
    batcher.add(request(0, 5, output=9))
    batcher.step()
    batcher.add(request(1, 20, output=2))
    batcher.add(request(2, 30, output=2))  # waits: LIMITS allow two
    batcher.step()
    batcher.cancel(0)
    batcher.cancel(0)
    batcher.cancel(2)
    while not batcher.idle:
        batcher.step()
    assert told == [(0, 6), (0, 7), (1, 21), (0, "cancelled"), (2, "cancelled"), (1, 22), (1, "length")]

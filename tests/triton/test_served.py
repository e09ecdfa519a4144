"""What clients get from a tritonserver that really runs: what ``arctic-trt run`` says, whatever others ask and whoever dies."""

from __future__ import annotations

import json
import os
import queue
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arctic_trt.model.tokenizer import Tokenizer
from tests.support.engines import ROOT, mpirun
from tests.support.served import BATCH, RANKS, TOKENIZER, Answer, Server, events, serving, wait_until

pytest.importorskip("pytriton", reason="tritonserver comes with the extra triton")
grpcclient = pytest.importorskip("tritonclient.grpc")
pytestmark = pytest.mark.triton

LONG = 2000
"""Tokens of an answer that takes its time."""
MOST = 24
"""Tokens that the references have; greedy answers to fewer are their beginnings."""
HEALING_S = 15.0
MODELS = ("arctic_bls", "ensemble")


@dataclass(frozen=True)
class Reference:
    """What ``arctic-trt run`` says to a prompt, alone in its batch or not."""

    prompt: str
    token_ids: list[int]
    finish_reason: str
    text: Callable[[list[int]], str]

    def holds(self, answer: Answer, max_tokens: int = MOST) -> bool:
        """Whether ``answer`` has the first ``max_tokens`` tokens of this, and their text."""
        expected = self.token_ids[:max_tokens]
        return answer.status == 200 and answer.token_ids == expected and answer.text == self.text(expected)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """64 beginnings of texts, of unequal lengths; some in bytes, because the vocabulary has no characters for them."""
    lines = (ROOT / "calib" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line).get("text", "") for line in lines]
    words = [text.split() for text in texts if len(text.split()) > 12]
    beginnings = [" ".join(words[index % len(words)][: 1 + index % 11]) for index in range(60)]
    return [*beginnings, "The future of AI is", "世界 says", "🙂🙂", "naïve café"]


@pytest.fixture
def references(shared_dir: Path, tiny_engine: Path, prompts: list[str]) -> list[Reference]:
    """Of each prompt, from one run on as many ranks as are served."""
    known = shared_dir / "references.json"
    if not known.exists():
        words = ["-m", "arctic_trt", "run", "--engine_dir", tiny_engine, "--max_output_len", MOST, "--json", "-q"]
        job = mpirun(RANKS, *words, *(word for prompt in prompts for word in ("--input_text", prompt)))
        assert job.code == 0, job.err
        known.write_text(job.out)
    decode = Tokenizer(TOKENIZER).decode
    outputs = json.loads(known.read_text())["outputs"]
    return [
        Reference(prompt, output["token_ids"], output["finish_reason"], decode)
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


@pytest.mark.parametrize("model", MODELS)
def test_generate_says_what_run_says(served: Server, references: list[Reference], model: str) -> None:
    for reference in references[-6:]:
        answer = served.ask(model, text_input=reference.prompt, max_tokens=MOST)
        assert reference.holds(answer), answer
        (part,) = answer.parts
        assert part["finish_reason"] == reference.finish_reason
        assert part["sequence_length"] == len(reference.token_ids)


@pytest.mark.parametrize("model", MODELS)
def test_pieces_add_up_and_are_whole_characters(served: Server, references: list[Reference], model: str) -> None:
    for reference in references[-6:]:
        answer = served.ask(model, stream=True, text_input=reference.prompt, max_tokens=MOST)
        assert reference.holds(answer), answer
        assert len(answer.parts) > 3
        assert not any("\N{REPLACEMENT CHARACTER}" in part["text_output"] for part in answer.parts)
        assert [part["finish_reason"] for part in answer.parts] == [""] * (len(answer.parts) - 1) + [reference.finish_reason]


@pytest.mark.parametrize("model", MODELS)
def test_grpc_streams_the_same(served: Server, references: list[Reference], model: str) -> None:
    reference = references[-4]
    pieces = [part for part in grpc_stream(served, model, reference.prompt) if "text_output" in part]
    assert [token for part in pieces for token in part["output_token_ids"]] == reference.token_ids
    assert "".join(part["text_output"][0].decode() for part in pieces) == reference.text(reference.token_ids)


def test_openai_s_own_client_hears_the_same(served: Server, references: list[Reference]) -> None:
    openai = pytest.importorskip("openai")
    reference = references[-4]
    asked = {"model": "arctic", "prompt": reference.prompt, "max_tokens": MOST}
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served.openai_port}/v1", api_key="none", timeout=60) as client:
        whole = client.completions.create(**asked)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == (
            reference.text(reference.token_ids),
            reference.finish_reason,
        )
        assert whole.usage.completion_tokens == len(reference.token_ids)
        pieces = [event.choices[0].text for event in client.completions.create(**asked, stream=True)]
        assert len(pieces) > 3 and "".join(pieces) == whole.choices[0].text
        turns = [{"role": "user", "content": "hello"}]
        chat = client.chat.completions.create(model="arctic", messages=turns, max_tokens=8)
        assert chat.choices[0].message.role == "assistant" and chat.usage.completion_tokens <= 8
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="arctic", messages=turns, temperature=-1)


def grpc_stream(served: Server, model: str, text: str, **more: Any) -> Iterator[dict[str, list[Any]]]:
    """The tensors of each response, as ``tritonclient``'s own examples ask for them."""
    arrays = {
        "text_input": (np.array([[text.encode()]], np.object_), "BYTES"),
        "max_tokens": (np.array([[MOST]], np.int32), "INT32"),
    }
    arrays |= {"stream": (np.array([[True]]), "BOOL")}
    inputs = []
    for name, (array, kind) in arrays.items():
        inputs.append(grpcclient.InferInput(name, array.shape, kind))
        inputs[-1].set_data_from_numpy(array)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpcclient.InferenceServerClient(f"127.0.0.1:{served.grpc_port}") as client:
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        client.async_stream_infer(model, inputs, enable_empty_final_response=True, **more)
        final = False
        while not final:
            result, error = answers.get(timeout=60)
            assert error is None, error
            response = result.get_response()
            final = response.parameters["triton_final_response"].bool_param
            yield {output.name: result.as_numpy(output.name).reshape(-1).tolist() for output in response.outputs}
        client.stop_stream()


def test_64_at_once_get_their_own_answers(served: Server, references: list[Reference]) -> None:
    def ask(index: int) -> bool:
        reference, length = references[index], 1 + index % MOST
        answer = served.ask(stream=index % 2 == 1, text_input=reference.prompt, max_tokens=length)
        return reference.holds(answer, length)

    with ThreadPoolExecutor(64) as clients:
        right = list(clients.map(ask, range(64)))
    assert all(right), [references[index].prompt for index, fine in enumerate(right) if not fine]


def test_samples_are_drawn_by_their_seed(served: Server) -> None:
    asked = {"text_input": "The", "max_tokens": 8, "temperature": 1.5, "top_k": 50, "num_return_sequences": 3}
    first, second = (served.ask(**asked, random_seed=5) for _ in range(2))
    assert first.parts == second.parts
    assert len(first.parts[0]["text_output"]) == 3
    assert served.ask(**asked, random_seed=6).parts != first.parts


def test_log_probabilities_are_of_the_tokens(served: Server) -> None:
    (part,) = served.ask(text_input="The future", max_tokens=5, return_log_probs=True).parts
    assert len(part["output_log_probs"]) == 5
    assert part["cum_log_probs"] == pytest.approx(sum(part["output_log_probs"]), rel=1e-4)
    assert all(value <= 0 for value in part["output_log_probs"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_word_ends_the_text_before_it(served: Server, references: list[Reference], stream: bool) -> None:
    reference = next(each for each in references if each.prompt == "The future of AI is")
    whole = reference.text(reference.token_ids)
    word = whole.split()[4][1:]  # within a word, and so within a token perhaps
    answer = served.ask(stream=stream, text_input=reference.prompt, max_tokens=MOST, stop_words=[word, ""])
    assert answer.text == whole[: whole.index(word)]
    assert answer.parts[-1]["finish_reason"] == "stop"


def test_bad_words_do_not_come_up(served: Server, references: list[Reference]) -> None:
    reference = next(each for each in references if each.prompt == "The future of AI is")
    word = reference.text(reference.token_ids).split()[1]
    answer = served.ask(text_input=reference.prompt, max_tokens=MOST, bad_words=[word])
    assert answer.status == 200 and word not in answer.text.split()


BODY = {"text_input": "The", "max_tokens": 4}
MISTAKES: dict[str, tuple[bytes, str]] = {
    "too long": (json.dumps({**BODY, "text_input": "word " * 5000}).encode(), "max_input_len|max_seq_len"),
    "not utf-8": (b'{"text_input": "\xff\xfe", "max_tokens": 4}', "UTF-8|encoding|parse"),
    "negative temperature": (json.dumps({**BODY, "temperature": -1}).encode(), "temperature -1"),
    "no tokens": (json.dumps({**BODY, "max_tokens": 0}).encode(), "max_tokens"),
    "unknown field": (json.dumps({**BODY, "temprature": 1}).encode(), "temprature"),
    "two prompts": (json.dumps({**BODY, "messages": "[]"}).encode(), "messages"),
    "no prompt": (json.dumps({"max_tokens": 4}).encode(), "text_input"),
    "beams": (json.dumps({**BODY, "beam_width": 4}).encode(), "beam_width 4"),
    "seeds": (json.dumps({**BODY, "random_seed": 1, "seed": 2}).encode(), "seed"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(served: Server, name: str) -> None:
    data, expected = MISTAKES[name]
    for model in MODELS:
        answer = served.post(f"/v2/models/{model}/generate", data)
        assert answer.status == 400, answer
        pytest.raises(AssertionError, match=expected).matches(AssertionError(answer.error))
        assert "Traceback" not in answer.error


def test_a_body_of_100_megabytes_is_refused_and_the_server_lives(served: Server) -> None:
    try:
        answer = served.ask(text_input="word " * 20_000_000, max_tokens=4)
    except (OSError, HTTPException):
        pytest.fail("the server did not answer")
    assert 400 <= answer.status < 500, answer.status
    assert served.ask(**BODY).status == 200


@pytest.mark.parametrize("model", ["arctic_bls"])
def test_clients_that_leave_take_their_requests_along(served: Server, model: str) -> None:
    before = served.metric("arctic_trt_generated_tokens_total")
    with ThreadPoolExecutor(BATCH) as clients:
        list(clients.map(lambda index: leave_after_one_piece(served, model, index), range(BATCH)))
    wait_until(lambda: served.metric("arctic_trt_requests_active") == 0, 10, "slots of clients that left are free")
    assert served.metric("arctic_trt_generated_tokens_total") - before < BATCH * LONG / 2


def leave_after_one_piece(served: Server, model: str, index: int) -> None:
    with begun(served, model, f"{index}"):
        pass


@contextmanager
def begun(server: Server, model: str, text: str, max_tokens: int = LONG) -> Iterator[HTTPResponse]:
    """A long answer of which the first piece has come."""
    body = {"text_input": text, "max_tokens": max_tokens, "stream": True, "end_id": -1}
    with server.connected() as connection:
        connection.request("POST", f"/v2/models/{model}/generate_stream", json.dumps(body))
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        yield response


@pytest.mark.parametrize("victim", [0, -1], ids=["the first rank", "the last rank"])
def test_a_killed_rank_costs_what_is_under_way_and_nothing_else(served: Server, references: list[Reference], victim: int) -> None:
    ranks = served.ranks()
    assert len(ranks) == RANKS
    with ThreadPoolExecutor(2 * BATCH) as clients:
        asked = [clients.submit(served.ask, text_input=f"{index}", max_tokens=LONG, end_id=-1) for index in range(2 * BATCH)]
        wait_until(lambda: served.metric("arctic_trt_requests_active") > 0, 20, "requests are under way")
        os.kill(ranks[victim], signal.SIGKILL)
        wait_until(lambda: not served.is_ready(), HEALING_S, "readiness turns false")
        deadline = time.monotonic() + HEALING_S
        answers = [each.result(max(0.0, deadline - time.monotonic())) for each in asked]
    refused = [answer for answer in answers if answer.status != 200]
    assert refused and all("again" in answer.error for answer in refused)
    assert all(len(answer.token_ids) == LONG for answer in answers if answer.status == 200)
    wait_until(served.is_ready, 60, "service is back")
    assert set(served.ranks()).isdisjoint(ranks)
    assert references[-1].holds(served.ask(text_input=references[-1].prompt, max_tokens=MOST))


def test_a_full_queue_refuses_and_sigterm_drains(tiny_engine: Path, tmp_path: Path) -> None:
    """A server of its own, of which nothing is left afterwards."""
    before = leftovers()
    with serving(tiny_engine, tmp_path, "--max_queue_size", 2, "--drain_timeout", 60) as (process, server):
        with ThreadPoolExecutor(6 * BATCH) as clients:
            asked = [clients.submit(server.ask, text_input="The", max_tokens=100, end_id=-1) for _ in range(6 * BATCH)]
            answers = Counter(each.result().status for each in asked)
        assert answers.keys() == {200, 503}, answers
        with ExitStack() as stack:
            under_way = [stack.enter_context(begun(server, "arctic_bls", f"{index}", 300)) for index in range(BATCH)]
            process.send_signal(signal.SIGTERM)
            pieces = [events(response.read().decode()) for response in under_way]
        assert process.wait(60) == 0, server.log.read_text()
    assert all(parts[-1]["finish_reason"] == "length" for parts in pieces)
    assert leftovers() <= before


def leftovers() -> set[Path]:
    return set(Path("/dev/shm").glob("arctic-trt-*"))

"""The models ``arctic`` and ``arctic_bls`` in a Triton of our own, with ranks that do what a test says."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.service.calls import Call, OnEvent
from arctic_trt.runtime.service.group import DOWN, UP, GroupOptions, GroupStats
from arctic_trt.runtime.service.protocol import Event, failure
from arctic_trt.triton import bls as bls_module
from arctic_trt.triton import engine as engine_module
from arctic_trt.triton.bls import Bls
from arctic_trt.triton.engine import Engine
from arctic_trt.triton.tensors import CLIENT_OUTPUTS, ENGINE_OUTPUTS, inner_name
from tests.support.fake_stub import FakeTriton, InferenceResponse, Request, model_args, strings
from tests.triton.test_parts import until

TINY = Path(__file__).parents[1] / "data" / "tiny-arctic"
CAPACITY = 2
ENGINE_ARGS = model_args(
    engine_dir="/engine", tokenizer_dir=str(TINY), world_size="2", capacity=str(CAPACITY), exclude_input_in_output="true"
)
BLS_ARGS = model_args(tokenizer_dir=str(TINY), max_input_len="64", capacity=str(CAPACITY), exclude_input_in_output="true")
ENGINE_NAMES = [inner_name(tensor) for tensor in ENGINE_OUTPUTS]
CLIENT_NAMES = [tensor.name for tensor in CLIENT_OUTPUTS]


@dataclass
class Asked:
    """A call at the ranks."""

    id: int
    body: Mapping[str, Any]
    on_event: OnEvent
    end_ids: Sequence[int] | None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def say(self, *tokens: int, **more: Any) -> None:
        self.on_event(Event(id=self.id, token_ids=tokens, **more))

    def finish(self, *tokens: int, reason: str = "stop", **more: Any) -> None:
        self.say(*tokens, finish_reason=reason, final=True, first_token_s=0.1, total_s=0.2, **more)


class Group:
    """In the place of the worker group; a cancelled call ends with what there is."""

    last: Group

    def __init__(self, options: GroupOptions, on_state: Any) -> None:
        self.options, self.on_state, self.asked, self.state, self.stats = options, on_state, [], UP, GroupStats()
        self.refuse: str | None = None
        self.closed: list[float] = []
        Group.last = self

    def start(self) -> None:
        self.on_state(UP)

    def submit(self, body: Mapping[str, Any], on_event: OnEvent, *, end_ids: Sequence[int] | None) -> Call:
        asked = Asked(len(self.asked) + 1, body, on_event, end_ids)

        def cancel(_: int) -> None:
            if not asked.cancelled.is_set():
                asked.cancelled.set()
                asked.finish(reason="cancelled")

        self.asked.append(asked)
        if self.refuse:
            on_event(failure(asked.id, "unavailable", self.refuse))
        return Call(asked.id, on_event, cancel)

    def close(self, drain_s: float = 0.0) -> None:
        self.closed.append(drain_s)

    def call(self, number: int) -> Asked:
        """The call of this number, as soon as it has come."""
        until(lambda: len(self.asked) > number)
        return self.asked[number]  # type: ignore[no-any-return]


@pytest.fixture
def triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTriton:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(engine_module, "WorkerGroup", Group)
    for module in (engine_module, bls_module):
        monkeypatch.setattr(module, "end_with_server", lambda clean_up: None)
    monkeypatch.setattr(engine_module, "METRICS_PERIOD_S", 0.01)
    monkeypatch.delenv(engine_module.HTTP_ADDRESS, raising=False)
    return FakeTriton()


@pytest.fixture
def engine(triton: FakeTriton) -> Iterator[Engine]:
    engine = Engine(triton, ENGINE_ARGS)
    yield engine
    engine.close()


@pytest.fixture
def bls(triton: FakeTriton, engine: Engine) -> Iterator[Bls]:
    triton.serve("arctic", engine.execute)
    bls = Bls(triton, BLS_ARGS)
    yield bls
    bls.close()


def ids(*tokens: int) -> Any:
    return np.array([tokens], np.int32)


def ask(model: Engine | Bls, **more: Any) -> Request:
    """Have ``model`` execute a request, which returns when there is room for another one, or in a thread of its own."""
    wait = more.pop("wait", True)
    outputs = more.pop("outputs", ENGINE_NAMES if isinstance(model, Engine) else CLIENT_NAMES)
    request_id, parameters = more.pop("id", ""), more.pop("parameters", None)
    request = Request(more, id=request_id, parameters=parameters, outputs=outputs)
    if wait:
        model.execute([request])
    else:
        threading.Thread(target=model.execute, args=([request],), daemon=True).start()
    return request


STREAM = {"streaming": np.array([[True]])}


def test_the_group_is_started_as_the_parameters_say(engine: Engine) -> None:
    options = Group.last.options
    assert (options.engine_dir, options.tokenizer_dir, options.world_size) == (Path("/engine"), TINY, 2)
    assert (options.kv_cache_memory, options.max_tokens_in_paged_kv_cache) == (None, None)


def test_pieces_are_responses(engine: Engine) -> None:
    request = ask(engine, input_ids=ids(5, 6), request_output_len=ids(3), runtime_top_k=ids(1), end_id=ids(7), **STREAM)
    call = Group.last.call(0)
    assert call.body == {"prompt": [5, 6], "max_tokens": 3, "top_k": 1, "stream": True} and call.end_ids == (7,)
    responses = request.responses()
    call.say(4)
    assert next(responses).arrays["output_ids"].tolist() == [[[4]]]
    call.finish(8, 9)
    last = next(responses).arrays
    assert last["output_ids"].tolist() == [[[8, 9]]] and last["finish_reason"].tolist() == [[b"stop"]]
    assert list(responses) == []


def test_only_outputs_that_were_named_are_made(engine: Engine) -> None:
    request = ask(engine, input_ids=ids(5), outputs=["output_ids", "finish_reason"])
    Group.last.call(0).finish(4)
    (response,) = request.responses()
    assert response.arrays.keys() == {"output_ids", "finish_reason"}


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({}, "input_ids is missing."),
        ({"input_ids": ids(5), "parameters": {"foo": 1}}, "The parameter 'foo' is not known."),
        ({"input_ids": ids(5), "beam_width": ids(4)}, "beam_width 4 is not supported"),
    ],
)
def test_what_is_refused_never_reaches_the_ranks(engine: Engine, more: dict[str, Any], complaint: str) -> None:
    (response,) = ask(engine, **more).responses()
    assert response.error().message().startswith(complaint) and response.error().code() == "INVALID_ARG"
    assert Group.last.asked == []


@pytest.mark.parametrize(
    ("code", "expected"), [("invalid", "INVALID_ARG"), ("unavailable", "UNAVAILABLE"), ("internal", "INTERNAL")]
)
def test_errors_of_the_ranks(engine: Engine, code: str, expected: str) -> None:
    request = ask(engine, input_ids=ids(5), **STREAM)
    call = Group.last.call(0)
    call.say(4)
    call.on_event(failure(call.id, code, "n 200 is not valid."))
    *_, last = request.responses()
    assert (last.error().message(), last.error().code()) == ("num_return_sequences 200 is not valid.", expected)


def test_ranks_that_refuse_at_once(engine: Engine) -> None:
    Group.last.refuse = "The engine is not ready: ask again in a moment."
    for _ in range(3 * CAPACITY):  # none of them takes a slot for good
        (response,) = ask(engine, input_ids=ids(5)).responses()
        assert "ask again" in response.error().message()


def test_a_full_engine_keeps_triton_waiting(engine: Engine) -> None:
    first = ask(engine, input_ids=ids(5))
    second = ask(engine, input_ids=ids(6), wait=False)
    third = threading.Thread(
        target=lambda: (until(lambda: len(Group.last.asked) == 2), engine._slots.wait_for_room()), daemon=True
    )
    third.start()
    third.join(0.05)
    assert third.is_alive()
    Group.last.call(0).finish(4)
    assert len(list(first.responses())) == 1
    third.join(20)
    assert not third.is_alive()
    Group.last.call(1).finish(4)
    list(second.responses())


def test_a_client_that_leaves_frees_its_slot(engine: Engine) -> None:
    request = ask(engine, input_ids=ids(5), num_return_sequences=ids(1), **STREAM)
    call = Group.last.call(0)
    request.sender.cancelled = True
    assert call.cancelled.wait(20)
    (last,) = request.responses()
    assert last.arrays["finish_reason"].tolist() == [[b"cancelled"]]
    until(lambda: engine._slots.taken == 0)


def test_a_client_that_left_while_it_waited(engine: Engine) -> None:
    request = Request({"input_ids": ids(5)}, outputs=ENGINE_NAMES)
    request.sender.cancelled = True
    engine.execute([request])
    assert list(request.responses()) == [] and Group.last.asked == []


def test_a_request_is_stopped_by_its_id(engine: Engine) -> None:
    requests = [ask(engine, input_ids=ids(5), id=name, wait=False) for name in ("a", "b")]
    Group.last.call(1)
    # only when there is room for it, or by the line that arctic_bls has
    threading.Thread(target=engine._cancel_id, args=("b",), daemon=True).start()
    until(lambda: any(call.cancelled.is_set() for call in Group.last.asked))
    assert list(ask(engine, stop=np.array([[True]]), id="a").responses()) == []
    assert all(call.cancelled.wait(20) for call in Group.last.asked)
    assert [len(list(request.responses())) for request in requests] == [1, 1]


def test_nobody_is_stopped_by_no_id(engine: Engine) -> None:
    request = ask(engine, input_ids=ids(5))
    assert list(ask(engine, stop=np.array([[True]])).responses()) == []
    assert not Group.last.call(0).cancelled.is_set()
    Group.last.call(0).finish(4)
    list(request.responses())


def test_a_request_that_takes_too_long(triton: FakeTriton) -> None:
    slow = {"request_timeout_s": "0.05", "engine_dir": "/e", "tokenizer_dir": "/t", "world_size": "1", "capacity": "1"}
    cache = {"kv_cache_memory": "1GB", "max_tokens_in_paged_kv_cache": "64", "device": "cpu"}
    engine = Engine(triton, model_args(**slow, **cache, exclude_input_in_output="true"))
    options = Group.last.options
    assert (options.kv_cache_memory, options.max_tokens_in_paged_kv_cache, options.device) == ("1GB", 64, "cpu")
    request = ask(engine, input_ids=ids(5), wait=False)
    (response,) = request.responses()
    assert response.error().message() == "The request took longer than request_timeout, 0.05 s."
    assert Group.last.call(0).cancelled.wait(20)
    engine.close()


def test_a_response_that_cannot_be_sent_costs_nobody_else(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    request, other = ask(engine, input_ids=ids(5), **STREAM), ask(engine, input_ids=ids(5), wait=False)
    call = Group.last.call(0)
    call.say("four")  # type: ignore[arg-type]
    assert call.cancelled.wait(20)
    (response,) = request.responses()
    assert "ask again" in response.error().message() and "was lost" in caplog.text
    Group.last.call(1).finish(4)
    assert len(list(other.responses())) == 1


def test_an_answer_of_bls_that_cannot_be_sent_costs_nobody_else(bls: Bls, caplog: pytest.LogCaptureFixture) -> None:
    request, other = ask(bls, input_ids=ids(5), stream=np.array([[True]])), ask(bls, input_ids=ids(5), wait=False)
    call = Group.last.call(0)
    call.say("four")  # type: ignore[arg-type]
    assert call.cancelled.wait(20)
    (response,) = request.responses()
    assert "ask again" in response.error().message() and "was lost" in caplog.text
    Group.last.call(1).finish(4)
    assert len(list(other.responses())) == 1


def test_metrics(triton: FakeTriton, engine: Engine) -> None:
    Group.last.stats = GroupStats(active=3, generated_tokens=40, restarts=1)
    until(lambda: triton.metrics["arctic_trt_generated_tokens_total"].value == 40)
    assert (triton.metrics["arctic_trt_up"].value, triton.metrics["arctic_trt_restarts_total"].value) == (1, 1)
    request = ask(engine, input_ids=ids(5))
    Group.last.call(0).finish(4)
    list(request.responses())
    until(lambda: triton.metrics["arctic_trt_request_seconds"].observed == [0.2])


def test_the_gate_follows_the_ranks(triton: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[Any] = []
    gate = SimpleNamespace(move=moves.append, close=lambda: moves.append("closed"))
    monkeypatch.setattr(engine_module, "Gate", lambda address: moves.append(address) or gate)
    monkeypatch.setenv(engine_module.HTTP_ADDRESS, "127.0.0.1:1")
    engine = Engine(triton, ENGINE_ARGS)
    for state in ("starting", DOWN, UP, "closed"):
        Group.last.on_state(state)
    engine.close()
    assert moves == ["127.0.0.1:1", True, False, True, "closed"] and Group.last.closed == [engine_module.DRAIN_S]


def test_readiness_without_an_address_is_said_to_be_triton_s(triton: FakeTriton, caplog: pytest.LogCaptureFixture) -> None:
    Engine(triton, ENGINE_ARGS).close()
    assert f"{engine_module.HTTP_ADDRESS} is not set" in caplog.text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


def said(responses: list[InferenceResponse]) -> str:
    return "".join(response.arrays["text_output"][0].decode() for response in responses)


def test_text_in_and_out(bls: Bls, tokenizer: Tokenizer) -> None:
    request = ask(bls, text_input=strings("The future"), max_tokens=ids(9), stop_words=strings("x"), stream=np.array([[True]]))
    call = Group.last.call(0)
    assert call.body == {"prompt": tokenizer.encode("The future"), "max_tokens": 9, "stop": ["x"], "stream": True}
    first, second = tokenizer.encode_bare("fine"), tokenizer.encode_bare(", is it")
    call.say(*first)
    responses = request.responses()
    found = [next(responses)]
    call.finish(*second, context_ids=tuple(first), reason="length")
    found += responses
    assert said(found) == tokenizer.decode(first + second)
    assert found[-1].arrays.keys() == set(CLIENT_NAMES)
    assert found[-1].arrays["finish_reason"].tolist() == [[b"length"]]
    assert found[-1].arrays["output_token_ids"].tolist() == [[second]]


def test_bls_makes_only_outputs_that_were_named(bls: Bls) -> None:
    request = ask(bls, input_ids=ids(5), outputs=["text_output"])
    Group.last.call(0).finish(4)
    (response,) = request.responses()
    assert response.arrays.keys() == {"text_output"}


def test_errors_behind_pieces_arrive(bls: Bls) -> None:
    request = ask(bls, input_ids=ids(5), stream=np.array([[True]]))
    call = Group.last.call(0)
    call.say(4)
    call.on_event(failure(call.id, "internal", "The engine stopped: ask again."))
    *_, last = request.responses()
    assert (last.error().message(), last.error().code()) == ("The engine stopped: ask again.", "INTERNAL")
    until(lambda: bls._slots.taken == 0)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"text_input": strings(b"\xff")}, "text_input is not UTF-8"),
        ({"text_input": strings("")}, "text_input is empty."),
        ({"text_input": strings("a"), "parameters": {"maxtokens": 1}}, "The parameter 'maxtokens' is not known. Did you mean"),
        ({"text_input": strings("a"), "top_logprobs": ids(2)}, "top_logprobs goes with return_log_probs"),
        ({"text_input": strings("a" * 2000)}, "text_input has 2000 characters"),
    ],
)
def test_what_bls_refuses(bls: Bls, more: dict[str, Any], complaint: str) -> None:
    (response,) = ask(bls, **more).responses()
    assert response.error().message().startswith(complaint) and response.error().code() == "INVALID_ARG"
    until(lambda: bls._slots.taken == 0)


def test_what_triton_itself_refuses_keeps_its_code(triton: FakeTriton, bls: Bls) -> None:
    def full(requests: list[Request]) -> None:
        error = InferenceResponse(error=triton.TritonError("Exceeds maximum queue size", "UNAVAILABLE"))
        requests[0].sender.send(error, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    triton.serve("arctic", full)
    (response,) = ask(bls, input_ids=ids(5)).responses()
    assert (response.error().message(), response.error().code()) == ("Exceeds maximum queue size", "UNAVAILABLE")


def test_a_client_of_bls_that_leaves_frees_its_slot(bls: Bls, engine: Engine) -> None:
    request = ask(bls, input_ids=ids(5), stream=np.array([[True]]))
    call = Group.last.call(0)
    request.sender.cancelled = True
    assert call.cancelled.wait(20)
    list(request.responses())
    until(lambda: bls._slots.taken == engine._slots.taken == 0)


def test_a_client_of_bls_that_left_while_it_waited(bls: Bls) -> None:
    request = Request({"input_ids": ids(5)}, outputs=CLIENT_NAMES)
    request.sender.cancelled = True
    bls.execute([request])
    assert list(request.responses()) == [] and Group.last.asked == []


def test_clients_hear_of_an_engine_that_dies(bls: Bls) -> None:
    request = ask(bls, input_ids=ids(5))
    call = Group.last.call(0)
    bls._line.close()  # as the kernel does for one who is killed
    (response,) = request.responses()
    assert "process has ended" in response.error().message()
    until(lambda: bls._slots.taken == 0)
    request = ask(bls, input_ids=ids(5))  # by a line to its successor
    Group.last.call(1).finish(4)
    assert said(list(request.responses()))
    assert call.cancelled.wait(20)  # for the engine, the other end is gone


def test_many_requests_at_once_get_their_own_answers(bls: Bls, tokenizer: Tokenizer) -> None:
    def answer() -> None:
        for number in range(40):
            call = Group.last.call(number)
            call.finish(*call.body["prompt"][1:])

    threading.Thread(target=answer, daemon=True).start()
    texts = [f"{number} is the number" for number in range(40)]
    requests = [ask(bls, text_input=strings(text)) for text in texts]
    assert [said(list(request.responses())) for request in requests] == texts

"""Streams of events from a server: good ones, and each way in which they can be bad."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence

import pytest

from arctic_trt.errors import UsageError
from arctic_trt.report.bench.clients import Client, OpenAiClient, Piece, ServerError, TritonClient, parse_events
from arctic_trt.report.bench.plan import Arrival
from arctic_trt.report.bench.stats import Trace
from arctic_trt.report.bench.target import ServerTarget
from arctic_trt.report.bench.workload import BenchPrompt
from tests.support.fake_llm_server import OPENAI, TRITON, FakeServer, fake_llm_server

PROMPT = BenchPrompt((5, 6, 7), "the sea is")
CLIENTS: list[Callable[[str], Client]] = [lambda url: TritonClient(url, "arctic"), lambda url: OpenAiClient(url, "arctic")]
both = pytest.mark.parametrize("make", CLIENTS, ids=["triton", "openai"])


def arrivals(*times: float, tokens: int = 4) -> list[Arrival]:
    return [Arrival(at_s=at_s, prompt=PROMPT, max_new_tokens=tokens) for at_s in times]


def serve(client: Client, asked: Sequence[Arrival], concurrency: int = 8) -> list[Trace]:
    ended: list[Trace] = []
    traces = ServerTarget(client).serve(asked, concurrency=concurrency, on_done=ended.append)
    assert sorted(ended, key=id) == sorted(traces, key=id)
    return traces


def error_of(server: FakeServer, make: Callable[[str], Client]) -> str:
    (trace,) = serve(make(server.url), arrivals(0.0))
    assert trace.error is not None
    return trace.error


@both
def test_a_good_answer(make: Callable[[str], Client]) -> None:
    with fake_llm_server(delay_s=0.005) as server:
        (trace,) = serve(make(server.url), arrivals(0.0))
    assert trace.error is None and (trace.input_tokens, trace.output_tokens, len(trace.token_times_s)) == (3, 4, 4)
    assert 0.005 <= trace.ttft_s < trace.latency_s and min(trace.gaps_s) > 0.002


def test_what_triton_is_asked() -> None:
    with fake_llm_server() as server:
        assert list(TritonClient(f"{server.url}/", "arctic").stream(PROMPT, 2)) == [Piece(True), Piece(True)]
    assert server.requests == [{"path": TRITON, "text_input": "the sea is", "max_tokens": 2, "stream": True}]


def test_what_an_openai_server_is_asked() -> None:
    with fake_llm_server() as server:
        for url in (server.url, f"{server.url}/v1/"):
            assert list(OpenAiClient(url, "m").stream(PROMPT, 1)) == [Piece(True), Piece(False, 1)]
    (first, second) = server.requests
    assert first == second and first["path"] == OPENAI
    assert (first["model"], first["prompt"], first["max_tokens"], first["stream"]) == ("m", [5, 6, 7], 1, True)
    assert (first["temperature"], first["ignore_eos"]) == (0, True)


def test_a_server_that_says_how_many_tokens_it_made_is_believed() -> None:
    with fake_llm_server(tokens_a_piece=3) as server:
        (trace,) = serve(OpenAiClient(server.url, "arctic"), arrivals(0.0, tokens=12))
        assert (trace.output_tokens, len(trace.token_times_s)) == (12, 4)
    with fake_llm_server(usage=False) as server:
        assert serve(OpenAiClient(server.url, "arctic"), arrivals(0.0))[0].output_tokens == 4


@both
@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("500", r'answered 500 Internal Server Error: \{"error": "the model is not ready"\}\.'),
        ("cut", r"(IncompleteRead|broke off)"),
        ("error_event", 'answered with an error: "out of memory"'),
        ("not_json", "sent an event that is not a JSON object: <html>"),
        ("empty", "answered without any output"),
    ],
)
def test_a_bad_answer_is_a_failed_request(make: Callable[[str], Client], fault: str, complaint: str) -> None:
    with fake_llm_server(fault) as server:
        error = error_of(server, make)
    assert re.search(complaint, error)
    assert server.url in error and "\n" not in error and error.endswith(".")


def test_a_stream_that_ends_too_soon_is_noticed_without_a_broken_connection() -> None:
    with fake_llm_server("cut_cleanly") as server:
        assert "the stream broke off before [DONE]" in error_of(server, CLIENTS[1])


def test_an_event_of_another_model() -> None:
    with fake_llm_server("wrong_event") as server:
        assert 'sent an event without text_output: {"id": 1}' in error_of(server, CLIENTS[0])


@both
def test_a_refused_connection(make: Callable[[str], Client]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    (trace,) = serve(make(url), arrivals(0.0))
    assert trace.error is not None and trace.error.startswith(url) and trace.error.endswith("Connection refused.")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://", ""])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match=r"is not the address of a server.*http://localhost:8000"):
        TritonClient(url, "arctic")


@both
def test_one_bad_answer_spoils_no_other(make: Callable[[str], Client]) -> None:
    with fake_llm_server(None, "500", None, "cut") as server:
        traces = serve(make(server.url), arrivals(0.0, 0.02, 0.04, 0.06, 0.08))
    assert [trace.error is None for trace in traces] == [True, False, True, False, True]


def test_no_more_than_allowed_are_under_way_and_waiting_counts() -> None:
    with fake_llm_server(delay_s=0.02) as server:
        traces = serve(TritonClient(server.url, "arctic"), arrivals(*[0.0] * 6, tokens=2), concurrency=2)
        assert server.most_under_way == 2
    assert sorted(trace.ttft_s for trace in traces)[-1] > 2 * 0.04
    assert all(trace.arrival_s == 0 for trace in traces)


def test_requests_wait_for_their_time() -> None:
    with fake_llm_server() as server:
        traces = serve(TritonClient(server.url, "arctic"), arrivals(0.0, 0.15))
    assert traces[1].token_times_s[0] >= 0.15 and traces[1].ttft_s < 0.14


def test_events_by_the_standard() -> None:
    stream = b': comment\r\nevent: x\r\ndata: {"a":\r\ndata:1}\r\n\r\n\r\nid: 3\ndata: two\n\n'.splitlines(keepends=True)
    assert list(parse_events(stream)) == ['{"a":\n1}', "two"]
    with pytest.raises(ServerError, match="broke off within an event: three"):
        list(parse_events([*stream, b"data: three\n"]))

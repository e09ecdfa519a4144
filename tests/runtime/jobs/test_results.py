"""Lines of the output, in the shape that OpenAI's batch results have."""

from __future__ import annotations

import json

from arctic_trt.runtime.completion import Completion
from arctic_trt.runtime.jobs.lines import LineError, parse_line
from arctic_trt.runtime.jobs.output_file import read_result
from arctic_trt.runtime.jobs.results import error_line, result_line

DONE = [
    Completion(prompt=(1, 2), token_ids=(3, 4, 5), text="a\nb", finish_reason="stop"),
    Completion(prompt=(1, 2), token_ids=(6,), text="é", finish_reason="length"),
]


def test_a_completion() -> None:
    line = parse_line({"custom_id": "a", "prompt": "x", "n": 2}, 17)
    data = result_line(line, DONE, model="engine", created=1000)
    assert data.count(b"\n") == 1 and data.isascii() and read_result(data) == (16, False)
    assert json.loads(data) == {
        "id": "batch_req_17",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "req_17",
            "body": {
                "id": "cmpl-17",
                "object": "text_completion",
                "created": 1000,
                "model": "engine",
                "choices": [
                    {"index": 0, "text": "a\nb", "logprobs": None, "finish_reason": "stop"},
                    {"index": 1, "text": "é", "logprobs": None, "finish_reason": "length"},
                ],
                "usage": {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6},
            },
        },
        "error": None,
    }


def test_token_ids_for_token_ids() -> None:
    body = json.loads(result_line(parse_line({"prompt": [1, 2]}, 1), DONE[:1], model="e", created=0))["response"]["body"]
    assert body["choices"][0]["token_ids"] == [3, 4, 5]


def test_a_chat() -> None:
    line = parse_line({"messages": [{"role": "user", "content": "x"}], "model": "mine"}, 3)
    value = json.loads(result_line(line, DONE[1:], model="engine", created=0))
    body = value["response"]["body"]
    assert (value["custom_id"], body["id"], body["object"], body["model"]) == ("line-3", "chatcmpl-3", "chat.completion", "mine")
    message = {"role": "assistant", "content": "é", "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]


def test_an_error() -> None:
    data = error_line(4, "a", LineError("invalid_json", "No."))
    assert data.endswith(b"}\n") and read_result(data) == (3, True)
    error = {"code": "invalid_json", "message": "No."}
    assert json.loads(data) == {"id": "batch_req_4", "custom_id": "a", "response": None, "error": error}

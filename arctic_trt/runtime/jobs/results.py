"""What a line of the output says: OpenAI's batch output, with the request's place in the input in its ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from arctic_trt.runtime.completion import Completion
from arctic_trt.runtime.jobs.lines import Line, LineError
from arctic_trt.runtime.jobs.logprobs import NameOf, chat_logprobs, text_logprobs

ID = "batch_req_"
OK = 200


def error_line(number: int, custom_id: str, error: LineError) -> bytes:
    """The result of a line that could not be done."""
    value = {"code": error.code, "message": error.message}
    return _line({"id": f"{ID}{number}", "custom_id": custom_id, "response": None, "error": value})


def result_line(line: Line, completions: Sequence[Completion], *, model: str, created: int, name_of: NameOf = str) -> bytes:
    """The result of a line, with a choice for each completion.

    ``created`` is in seconds since 1970; ``name_of`` gives a token's text, as its log probability is listed under.
    """
    prompt_tokens, output_tokens = len(completions[0].prompt), sum(len(each.token_ids) for each in completions)
    body = {
        "id": f"{'chatcmpl' if line.chat else 'cmpl'}-{line.number}",
        "object": "chat.completion" if line.chat else "text_completion",
        "created": created,
        "model": line.body.model or model,
        "choices": [_choice(line, index, completion, name_of) for index, completion in enumerate(completions)],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
        },
    }
    response = {"status_code": OK, "request_id": f"req_{line.number}", "body": body}
    return _line({"id": f"{ID}{line.number}", "custom_id": line.custom_id, "response": response, "error": None})


def _choice(line: Line, index: int, completion: Completion, name_of: NameOf) -> dict[str, Any]:
    said: dict[str, Any]
    if line.chat:
        said = {"message": {"role": "assistant", "content": completion.text, "refusal": None}}
    else:
        said = {"text": completion.text}
        if not isinstance(line.body.prompt, str):
            said["token_ids"] = list(completion.token_ids)
    logprobs = None
    if completion.logprobs is not None:
        logprobs = (chat_logprobs if line.chat else text_logprobs)(completion.logprobs, name_of)
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": completion.finish_reason}


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"

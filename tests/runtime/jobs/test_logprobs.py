"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

import json
from pathlib import Path

from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.chooser import TokenLogprobs
from arctic_trt.runtime.completion import Completion
from arctic_trt.runtime.jobs.lines import parse_line
from arctic_trt.runtime.jobs.logprobs import chat_logprobs, names_of, text_logprobs
from arctic_trt.runtime.jobs.results import result_line
from tests.support.small_tokenizer import write_tokenizer

NAMES = {5: " the", 6: "bytes:\\xe2", 7: "é"}
LOGPROBS = (
    TokenLogprobs(5, -0.5, ((5, -0.5), (7, -1.0))),
    TokenLogprobs(6, -2.0, ((7, -0.1), (5, -3.0))),
    TokenLogprobs(7, -0.25, ()),
)


def test_for_a_prompt() -> None:
    assert text_logprobs(LOGPROBS, NAMES.__getitem__) == {
        "tokens": [" the", "bytes:\\xe2", "é"],
        "token_logprobs": [-0.5, -2.0, -0.25],
        "top_logprobs": [{" the": -0.5, "é": -1.0}, {"é": -0.1, " the": -3.0}, {}],
        "text_offset": [0, 4, 14],
    }
    assert text_logprobs((), str) == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def test_for_a_chat() -> None:
    found = chat_logprobs(LOGPROBS[1:], NAMES.__getitem__)
    e = {"token": "é", "bytes": [0xC3, 0xA9]}
    assert found == {
        "content": [
            {
                "token": "bytes:\\xe2",
                "logprob": -2.0,
                "bytes": [0xE2],
                "top_logprobs": [{**e, "logprob": -0.1}, {"token": " the", "logprob": -3.0, "bytes": list(b" the")}],
            },
            {**e, "logprob": -0.25, "top_logprobs": []},
        ],
        "refusal": None,
    }


def test_names_of_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    name_of = names_of(tokenizer)
    ids = tokenizer.encode_bare("the 🦀")
    assert "".join(map(name_of, ids)).strip().startswith("the")
    assert [name_of(token) for token in ids[-4:]] == [f"bytes:\\x{byte:02x}" for byte in "🦀".encode()]
    assert names_of(None)(17) == "17"


def test_they_are_in_the_result_of_a_line_that_asked() -> None:
    done = [Completion(prompt=(1,), token_ids=(5, 6, 7), text="x", finish_reason="stop", logprobs=LOGPROBS)]
    for given, shape in (({"prompt": "x"}, "tokens"), ({"messages": [{"role": "user", "content": "x"}]}, "content")):
        line = parse_line({**given, "logprobs": True}, 1)
        value = json.loads(result_line(line, done, model="e", created=0, name_of=NAMES.__getitem__))
        assert len(value["response"]["body"]["choices"][0]["logprobs"][shape]) == 3

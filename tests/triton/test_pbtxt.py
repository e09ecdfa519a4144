"""The text format, read back by protobuf itself."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.triton.pbtxt import Word, render, string_parameters


def parse(text: str) -> Any:
    messages = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    return text_format.Parse(text, messages.ModelConfig())


def test_kinds_of_fields() -> None:
    text = render(
        {
            "name": "m",
            "max_batch_size": 1,
            "model_transaction_policy": {"decoupled": True},
            "input": [{"name": "a", "data_type": Word("TYPE_INT32"), "dims": [-1, 3]}, {"name": "b", "dims": [1]}],
        }
    )
    config = parse(text)
    assert (config.name, config.max_batch_size, config.model_transaction_policy.decoupled) == ("m", 1, True)
    assert [list(each.dims) for each in config.input] == [[-1, 3], [1]]
    assert config.input[0].data_type == 8  # TYPE_INT32
    assert 'input { name: "a" data_type: TYPE_INT32 dims: [ -1, 3 ] }' in text.splitlines()


def test_what_is_long_stands_on_lines_of_its_own() -> None:
    text = render(
        {
            "input": [
                {
                    "name": "n" * 60,
                    "dims": [1],
                    "data_type": Word("TYPE_STRING"),
                    "optional": True,
                    "allow_ragged_batch": True,
                    "is_shape_tensor": False,
                    "reshape": {"shape": [1, 2, 3, 4, 5, 6, 7, 8, 9]},
                }
            ]
        }
    )
    assert len(text.splitlines()) == 9 and parse(text).input[0].optional
    assert not any(line != line.rstrip() for line in text.splitlines())


@given(st.dictionaries(st.text(min_size=1), st.text(), max_size=3))
def test_texts_survive(parameters: dict[str, str]) -> None:
    parameters = {key: value for key, value in parameters.items() if (key + value).isprintable()}
    config = parse(render({"parameters": string_parameters(parameters)}))
    assert {key: value.string_value for key, value in config.parameters.items()} == parameters

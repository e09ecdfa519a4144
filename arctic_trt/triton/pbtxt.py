"""Protobuf's text format, in which Triton wants ``config.pbtxt``, written from plain values: there is nothing to fill in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Union

INDENT = "  "

Value = Union[str, int, float, "Word", Mapping[str, "Value"], Sequence["Value"]]
Message = Mapping[str, Value]


class Word(str):
    """A name of an enumeration, which stands without quotes."""

    __slots__ = ()


def render(message: Message) -> str:
    """``message`` as text; a list of messages repeats its field, a list of anything else stands in brackets."""
    return "".join(f"{line}\n" for line in _fields(message))


def string_parameters(parameters: Mapping[str, str]) -> list[Message]:
    """The field ``parameters`` of a model's configuration, whose values Triton hands to its backend."""
    return [{"key": key, "value": {"string_value": value}} for key, value in parameters.items()]


def ensemble_step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> Message:
    """A step of an ensemble: the ``model``'s own names for tensors, and what the ensemble calls them."""
    return {
        "model_name": model,
        "model_version": -1,
        "input_map": [{"key": key, "value": value} for key, value in inputs.items()],
        "output_map": [{"key": key, "value": value} for key, value in outputs.items()],
    }


def _fields(message: Message) -> list[str]:
    return [line for name, value in message.items() for line in _field(name, value)]


def _field(name: str, value: Value) -> list[str]:
    if isinstance(value, Mapping):
        return _block(name, value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(item, Mapping) for item in value):
            return [line for item in value for line in _field(name, item)]
        return [f"{name}: [ {', '.join(map(_scalar, value))} ]"]
    return [f"{name}: {_scalar(value)}"]


def _block(name: str, message: Message) -> list[str]:
    inside = _fields(message)
    flat = f"{name} {{ {' '.join(inside)} }}"
    if len(flat) <= 120 and not any(line.endswith("{") for line in inside):
        return [flat]
    return [f"{name} {{", *(INDENT + line for line in inside), "}"]


def _scalar(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Word) or not isinstance(value, str):
        return str(value)
    return json.dumps(value, ensure_ascii=False)  # the two formats escape alike what a path or a name may hold

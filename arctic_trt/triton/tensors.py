"""The one table of the tensors that clients see: for ``config.pbtxt``, for reading requests, for the documentation.

Names are those of TensorRT-LLM's Triton backend, so that its clients work unchanged; what is ours says so.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from arctic_trt.errors import UsageError

Array = npt.NDArray[Any]
Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output; ``kind`` and ``dims`` as Triton has them, without the dimension of the batch.

    An input becomes the ``field`` of a batch job's line. It is called ``inner`` at the model ``arctic``. Where ``only`` is
    given, every other value asks for what does not exist here.
    """

    name: str
    kind: str
    meaning: str
    dims: tuple[int, ...] = (1,)
    field: str = ""
    inner: str = ""
    only: tuple[float, ...] = ()


WORDS = (-1,)
TEXT, MESSAGES, IDS = "text_input", "messages", "input_ids"
PROMPTS = (
    Tensor(TEXT, "STRING", "the prompt"),
    Tensor(MESSAGES, "STRING", "instead of `text_input`: a conversation, as JSON a list of `{role, content}` (ours)"),
    Tensor(IDS, "INT32", "instead of `text_input`: the prompt as token ids (ours)", dims=WORDS),
)
"""Exactly one of them is given."""
PARAMETERS = (
    Tensor(
        "max_tokens",
        "INT32",
        "tokens to generate, at most; all that fit if absent",
        field="max_tokens",
        inner="request_output_len",
    ),
    Tensor("stop_words", "STRING", "texts that end the output, and are not part of it", dims=WORDS, field="stop"),
    Tensor("bad_words", "STRING", "texts that must not come up", dims=WORDS, field="bad_words"),
    Tensor("temperature", "FP32", "0 is greedy", field="temperature"),
    Tensor("top_k", "INT32", "draw among so many; 0 is off", field="top_k", inner="runtime_top_k"),
    Tensor("top_p", "FP32", "draw among the likeliest that make up so much; 0 is off", field="top_p", inner="runtime_top_p"),
    Tensor("min_p", "FP32", "relative to the likeliest, the least likelihood to be drawn; 0 is off", field="min_p"),
    Tensor("repetition_penalty", "FP32", "divides the logits of what came up; 1 is off", field="repetition_penalty"),
    Tensor("presence_penalty", "FP32", "subtracted once for what the output has", field="presence_penalty"),
    Tensor("frequency_penalty", "FP32", "subtracted for each time the output has it", field="frequency_penalty"),
    Tensor("random_seed", "UINT64", "the same seed draws the same tokens", field="seed"),
    Tensor("seed", "UINT64", "newer name of `random_seed`", field="seed"),
    Tensor("num_return_sequences", "INT32", "outputs for the prompt", field="n"),
    Tensor("stream", "BOOL", "a response a piece of text, instead of one at the end", field="stream", inner="streaming"),
    Tensor("return_log_probs", "BOOL", "fill the two outputs of log probabilities"),
    Tensor("top_logprobs", "INT32", "with `return_log_probs`: name so many of the likeliest tokens too (ours)"),
    Tensor("exclude_input_in_output", "BOOL", "false: the output begins with the prompt; true by default"),
    Tensor("end_id", "INT32", "the token that ends the output, -1 for none; the tokenizer's if absent"),
    Tensor("pad_id", "INT32", "fills up `output_token_ids` where outputs differ in length"),
    Tensor("beam_width", "INT32", "beams are not supported", only=(1,)),
    Tensor("length_penalty", "FP32", "concerns beams alone", inner="len_penalty", only=(0, 1)),
    Tensor("min_tokens", "INT32", "not supported", only=(0, 1)),
    Tensor("return_context_logits", "BOOL", "not supported", only=(0,)),
    Tensor("return_generation_logits", "BOOL", "not supported", only=(0,)),
)
STOP = Tensor("stop", "BOOL", "cancel the request under way that has the same id")
LENGTHS = Tensor("input_lengths", "INT32", "tokens of `input_ids`; the rest is padding")

TEXT_OUTPUT = Tensor("text_output", "STRING", "the text, a piece of it when streaming", dims=WORDS)
TOKEN_IDS = Tensor("output_token_ids", "INT32", "the tokens of this response (ours)", dims=(-1, -1), inner="output_ids")
ABOUT = (
    Tensor("sequence_length", "INT32", "tokens of this response", dims=WORDS),
    Tensor("cum_log_probs", "FP32", "the sum of the log probabilities so far, of each output", dims=WORDS),
    Tensor("output_log_probs", "FP32", "log probabilities of this response's tokens, 0 where not asked for", dims=(-1, -1)),
    Tensor("finish_reason", "STRING", "`stop`, `length` or `cancelled` in an output's last response, else empty", dims=WORDS),
    Tensor("sequence_index", "INT32", "which of the outputs a piece belongs to"),
    Tensor("batch_index", "INT32", "always 0"),
    Tensor("prompt_tokens", "INT32", "tokens of the prompt (ours)"),
)
TOP = Tensor("top_logprobs_json", "STRING", "for each output, a JSON list with an item a token (ours)", dims=WORDS)
PIECES = (
    Tensor("context_ids", "INT32", "tokens that decide about the leading space of what follows", dims=WORDS),
    Tensor("prompt_ids", "INT32", "the prompt, where the output is to begin with it", dims=WORDS),
    Tensor("trim", "INT32", "characters at the end of the text that do not belong to it", dims=WORDS),
)
"""What detokenization needs besides the tokens; between our models only."""
CLIENT_INPUTS = (*PROMPTS, *PARAMETERS)
CLIENT_OUTPUTS = (TEXT_OUTPUT, *ABOUT, TOKEN_IDS, TOP)
TENSOR_OF_FIELD = {"logprobs": "top_logprobs", **{tensor.field: tensor.name for tensor in PARAMETERS if tensor.field}}
ENGINE_INPUTS = (PROMPTS[2], LENGTHS, *PARAMETERS, STOP)
ENGINE_OUTPUTS = (TOKEN_IDS, *ABOUT, *PIECES, TOP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request as the engine's ranks take it: a batch job's flat line, and what concerns the answer alone."""

    body: dict[str, Any]
    end_ids: tuple[int, ...] | None
    choices: int
    stream: bool
    echo: bool
    pad: int


def inner_name(tensor: Tensor) -> str:
    """What ``tensor`` is called at the model ``arctic``."""
    return tensor.inner or tensor.name


def read_values(arrays: Mapping[str, Array], tensors: Iterable[Tensor], *, inner: bool = False) -> Values:
    """Plain values by the tensors' outer names; raises :class:`UsageError` for text that is not UTF-8, or what does not exist."""
    values: Values = {}
    for tensor in tensors:
        name = inner_name(tensor) if inner else tensor.name
        if name not in arrays:
            continue
        found = [_plain(item, name) for item in arrays[name].reshape(-1).tolist()]
        if tensor.kind == "FP32":
            found = [shortest(item) for item in found]
        if tensor.dims == (1,) and len(found) != 1:
            raise UsageError(f"{name} has {len(found)} values, expected 1.", "Send a request for each prompt.")
        if tensor.only and found[0] not in tensor.only:
            raise UsageError(f"{name} {found[0]} is not supported, expected {tensor.only[-1]:g}.", "Leave it out.")
        values[tensor.name] = found[0] if tensor.dims == (1,) else found
    return values


def refuse_unknown(parameters: str) -> None:
    """Raise :class:`UsageError` for what ``generate`` could not make a tensor of: JSON as Triton gives a request's parameters."""
    names = sorted(json.loads(parameters or "{}"))
    if names:
        close = difflib.get_close_matches(names[0], [tensor.name for tensor in (*CLIENT_INPUTS, *ENGINE_INPUTS)], n=1)
        raise UsageError(f"The parameter {names[0]!r} is not known.", f"Did you mean {close[0]!r}?" if close else "Leave it out.")


def plan_ask(values: Values, prompt: list[int], *, echo: bool) -> Ask:
    """What ``values`` ask for after the token ids ``prompt``; ``echo`` is if they do not say. Raises :class:`UsageError`."""
    body: dict[str, Any] = {"prompt": prompt}
    for tensor in PARAMETERS:
        if tensor.field and tensor.name in values:
            value = values[tensor.name]
            body[tensor.field] = [word for word in value if word] if tensor.dims == WORDS else value
    if "random_seed" in values and values.get("seed", values["random_seed"]) != values["random_seed"]:
        raise UsageError("seed and random_seed differ, expected one of them.")
    stream = bool(body.pop("stream", False))
    if values.get("return_log_probs"):
        body["logprobs"] = values.get("top_logprobs", 0)
    elif values.get("top_logprobs"):
        raise UsageError("top_logprobs goes with return_log_probs true.")
    end_id = values.get("end_id")
    return Ask(
        body={**body, "stream": stream},
        end_ids=None if end_id is None else (end_id,) if end_id >= 0 else (),
        choices=choices_of(values),
        stream=stream,
        echo=not values["exclude_input_in_output"] if "exclude_input_in_output" in values else echo,
        pad=values.get("pad_id", 0),
    )


def choices_of(values: Values) -> int:
    """Outputs that a request is to have; what is out of range counts as 1, and is refused later."""
    return max(1, int(values.get("num_return_sequences", 1)))


def in_tensors(message: str) -> str:
    """An error about a field of a batch job's line, in the name of the tensor that it came from."""
    first, space, rest = message.partition(" ")
    return TENSOR_OF_FIELD.get(first, first) + space + rest


def unpadded(values: Values) -> list[int]:
    """The prompt of a request to ``arctic``; raises :class:`UsageError` when there is none."""
    if IDS not in values:
        raise UsageError("input_ids is missing.", "Give the prompt's token ids, or ask arctic_bls with text_input.")
    ids: list[int] = values[IDS]
    length = values.get(LENGTHS.name, len(ids))
    if not 0 <= length <= len(ids):
        raise UsageError(f"input_lengths {length} is out of range, expected 0 to {len(ids)}, the length of input_ids.")
    return ids[:length]


def shortest(value: float) -> float:
    """The shortest decimal number that is ``value`` in float32: what the client wrote before it was packed."""
    return float(str(np.float32(value)))


def _plain(item: Any, name: str) -> Any:
    if not isinstance(item, bytes):
        return item
    try:
        return item.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start}).", "Send it as UTF-8.") from None

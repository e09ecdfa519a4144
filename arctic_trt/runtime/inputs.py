"""Prompts from the command line and from files, as text, conversations or token ids."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arctic_trt.checkpoint.contract import parse_object
from arctic_trt.errors import UsageError
from arctic_trt.model.tokenizer import Tokenizer

PADDING = -1
FORMS = '{"prompt": "..."}, {"messages": [{"role": ..., "content": ...}]} or {"input_ids": [...]}'

Message = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as it was given: exactly one of ``text``, ``messages`` and ``token_ids``; ``where`` names it in errors."""

    where: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    token_ids: tuple[int, ...] | None = None

    @property
    def shown(self) -> str:
        """The prompt for a person."""
        if self.text is not None:
            return self.text
        return self.messages[-1]["content"] if self.messages else f"{len(self.token_ids or ())} token ids"


def read_prompts(texts: Sequence[str], file: Path | None) -> list[Prompt]:
    """Prompts of ``--input_text`` or ``--input_file``; raises :class:`UsageError` naming flag, file and line."""
    if bool(texts) == bool(file):
        raise UsageError("Give either --input_text or --input_file.", "For example: --input_text 'The future of AI is'.")
    if file is None:
        return [Prompt(where=f"--input_text {index}", text=text) for index, text in enumerate(texts)]
    readers: dict[str, Callable[[Path], Iterator[Prompt]]] = {
        ".txt": _read_txt,
        ".csv": _read_csv,
        ".npy": _read_npy,
        ".jsonl": _read_jsonl,
    }
    if file.suffix not in readers:
        raise UsageError(f"--input_file {file} has the ending {file.suffix!r}, expected one of {', '.join(readers)}.")
    try:
        prompts = list(readers[file.suffix](file))
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}).", "Convert it to UTF-8.") from None
    except OSError as error:
        raise UsageError(f"--input_file {file} cannot be read: {error.strerror}.") from None
    if not prompts:
        raise UsageError(f"--input_file {file} holds no prompt.", "Give one prompt a line.")
    return prompts


def tokenize(prompt: Prompt, tokenizer: Tokenizer | None, *, chat: bool) -> list[int]:
    """Token ids of ``prompt``; with ``chat`` its text is the user's turn of a conversation. Ids are used as given."""
    if prompt.token_ids is not None:
        return list(prompt.token_ids)
    if tokenizer is None:
        raise UsageError(f"{prompt.where} is text, which needs a tokenizer.", "Give --tokenizer_dir.")
    if prompt.messages is not None:
        return tokenizer.encode_chat(list(prompt.messages), reply=True)
    if not prompt.text:
        raise UsageError(f"{prompt.where} is empty.", "Give it at least one character.")
    if chat:
        return tokenizer.encode_chat([{"role": "user", "content": prompt.text}], reply=True)
    return tokenizer.encode(prompt.text)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line) of all lines that are not blank."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path} line {number}", line.rstrip("\r\n")


def _read_txt(path: Path) -> Iterator[Prompt]:
    for where, line in _lines(path):
        yield Prompt(where=where, text=line)


def _read_csv(path: Path) -> Iterator[Prompt]:
    for where, line in _lines(path):
        try:
            ids = tuple(int(cell) for row in csv.reader([line]) for cell in row if cell.strip())
        except ValueError as error:
            raise UsageError(f"{where} is not a row of token ids: {error}.", "Separate integers by commas.") from None
        yield Prompt(where=where, token_ids=ids)


def _read_npy(path: Path) -> Iterator[Prompt]:
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UsageError(f"--input_file {path} is not a .npy file of numbers: {error}.") from None
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.kind not in "iu":
        found = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise UsageError(
            f"--input_file {path} holds {found}, expected integers of shape [batch, tokens], padded on the right with {PADDING}."
        )
    for index, row in enumerate(rows.tolist()):
        ids = _without_padding(row)
        if PADDING in ids:
            raise UsageError(f"{path} row {index} has {PADDING} before its last token.", "Pad on the right only.")
        yield Prompt(where=f"{path} row {index}", token_ids=tuple(ids))


def _without_padding(row: list[int]) -> list[int]:
    end = len(row)
    while end and row[end - 1] == PADDING:
        end -= 1
    return row[:end]


def _read_jsonl(path: Path) -> Iterator[Prompt]:
    for where, line in _lines(path):
        yield _from_object(parse_object(line, where, FORMS), where)


def _from_object(value: dict[str, Any], where: str) -> Prompt:
    given = [key for key in ("prompt", "text", "messages", "input_ids") if key in value]
    if len(given) != 1:
        found = " and ".join(given) or "none of the keys prompt, messages, input_ids"
        raise UsageError(f"{where} has {found}, expected exactly one.", f"Expected {FORMS}.")
    content = value[given[0]]
    if given[0] == "input_ids":
        if not isinstance(content, list) or not all(type(item) is int for item in content):
            raise UsageError(f"{where}: input_ids must be a list of integers.")
        return Prompt(where=where, token_ids=tuple(content))
    if given[0] == "messages":
        if not isinstance(content, list) or not content or not all(is_message(item) for item in content):
            raise UsageError(f"{where}: messages must be a list of objects with the texts 'role' and 'content'.")
        return Prompt(where=where, messages=tuple(content))
    if not isinstance(content, str):
        raise UsageError(f"{where}: {given[0]} must be a string, found {type(content).__name__}.")
    return Prompt(where=where, text=content)


def is_message(item: object) -> bool:
    """A turn of a conversation, as JSON has it."""
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("role", "content"))

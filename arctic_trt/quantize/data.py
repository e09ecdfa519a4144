"""Calibration samples: token ids from a file or a named data set, in its order, cut and grouped, never padded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arctic_trt.checkpoint.contract import parse_object
from arctic_trt.checkpoint.output_dir import write_bytes
from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.machine import cache_dir
from arctic_trt.model.tokenizer import Tokenizer

BUILT_IN = {"default": "default.jsonl", "heldout": "heldout.jsonl"}
NAMED = {
    "cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0", "article"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1", "text"),
}
NAMED_SAMPLES = 2048
FORMS = '{"text": "..."}, {"messages": [{"role": ..., "content": ...}]} or {"input_ids": [...]}'


def find_dataset(name: str, flag: str = "--calib_dataset") -> Path:
    """The file that ``flag`` means: a path, a set that comes with the package, or a named set, downloaded.

    Raises :class:`UsageError` for a name that is neither, and :class:`RefusedError` when a named set cannot be had here.
    """
    if name in BUILT_IN:
        packaged = Path(str(resources.files("arctic_trt"))) / "data" / "calib" / BUILT_IN[name]
        checkout = Path(__file__).resolve().parents[2] / "calib" / BUILT_IN[name]
        return packaged if packaged.exists() else checkout
    path = Path(name)
    if path.is_file():
        return path
    if name not in NAMED:
        raise UsageError(
            f"{flag} {name} is neither a file nor one of {', '.join([*BUILT_IN, *NAMED])}.",
            "Give a .jsonl file with one sample a line, or a .txt file with one text a line.",
        )
    return _download(name, flag)


def _download(name: str, flag: str) -> Path:
    """A named set's training split as a jsonl file in the user's cache."""
    hub_name, configuration, column = NAMED[name]
    cached = cache_dir() / f"{name}.jsonl"
    if cached.is_file():
        return cached
    instead = f"Give a .jsonl file of your own, or {flag} default."
    try:
        from datasets import load_dataset
    except ImportError:
        raise RefusedError(
            f"{flag} {name} needs the package datasets, which is not installed.",
            f"pip install 'arctic-trt[datasets]'. {instead}",
        ) from None
    try:
        rows = load_dataset(hub_name, configuration, split=f"train[:{NAMED_SAMPLES}]")
        lines = "".join(json.dumps({"text": row[column]}) + "\n" for row in rows)
    except Exception as error:  # the library raises whatever its network stack does
        reason = " ".join(str(error).split())[:200]
        raise RefusedError(f"{flag} {name} cannot be downloaded ({type(error).__name__}: {reason}).", instead) from None
    cached.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(cached, lines.encode())
    return cached


def read_samples(path: Path, *, limit: int, max_tokens: int, vocab_size: int, tokenizer_dir: Path) -> list[list[int]]:
    """Token ids of the first ``limit`` lines of ``path``, each cut at ``max_tokens``.

    Raises :class:`UsageError` with file and line number for anything that is not a sample. The tokenizer is loaded only when a
    line needs it; ``input_ids`` are used exactly as given.
    """
    tokenizer = _Lazy(lambda: Tokenizer(tokenizer_dir))
    samples: list[list[int]] = []
    for number, line in _lines(path):
        if len(samples) == limit:
            break
        where = f"{path} line {number}"
        value = {"text": line.rstrip("\r\n")} if path.suffix == ".txt" else parse_object(line, where, FORMS)
        ids = _sample(value, where, tokenizer)[:max_tokens]
        if not ids:
            raise UsageError(f"{where} has no tokens.", "Remove the line.")
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise UsageError(f"{where} has token ids outside 0..{vocab_size - 1}.", "Was it made with another tokenizer?")
        samples.append(ids)
    if not samples:
        raise UsageError(
            f"{path} holds no samples.", f"Expected one JSON object a line: {FORMS}; or a .txt file with one text a line."
        )
    return samples


def plan_batches(samples: Sequence[Sequence[int]], batch_size: int) -> list[Tensor]:
    """Group neighbours of equal length into int64 batches [B, T] of at most ``batch_size``.

    Nothing is padded: a padding token would be observed like any other and could widen a scale.
    """
    groups: list[list[Sequence[int]]] = []
    for sample in samples:
        if groups and len(groups[-1]) < batch_size and len(groups[-1][0]) == len(sample):
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return [torch.tensor(group, dtype=torch.int64) for group in groups]


class _Lazy:
    def __init__(self, make: Callable[[], Tokenizer]) -> None:
        self._make = make
        self._value: Tokenizer | None = None

    def __call__(self) -> Tokenizer:
        if self._value is None:
            self._value = self._make()
        return self._value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None


def _sample(value: dict[str, Any], where: str, tokenizer: _Lazy) -> list[int]:
    if "input_ids" in value:
        ids = value["input_ids"]
        if not isinstance(ids, list) or not all(type(item) is int for item in ids):
            raise UsageError(f"{where}: input_ids must be a list of integers.")
        return ids
    if "messages" in value:
        messages = value["messages"]
        if not isinstance(messages, list) or not all(_is_message(item) for item in messages):
            raise UsageError(f"{where}: messages must be a list of objects with the texts 'role' and 'content'.")
        return tokenizer().encode_chat(messages, reply=False)
    if "text" in value:
        if not isinstance(value["text"], str):
            raise UsageError(f"{where}: text must be a string, found {type(value['text']).__name__}.")
        return tokenizer().encode(value["text"])
    raise UsageError(f"{where} has none of the keys text, messages, input_ids.", f"Expected {FORMS}.")


def _is_message(item: object) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("role", "content"))

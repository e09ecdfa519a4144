"""From the tokens of an event to its text, without anything to remember between two events."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def chunk_text(decode: Callable[[list[int]], str], context_ids: Sequence[int], token_ids: Sequence[int], trim: int = 0) -> str:
    """The text that ``token_ids`` add after ``context_ids``, without its last ``trim`` characters.

    The texts of a choice's events, in their order, are the text of its completion. The context decides about a leading space.
    """
    known = decode(list(context_ids)) if context_ids else ""
    text = decode([*context_ids, *token_ids])[len(known) :]
    return text[: len(text) - trim]

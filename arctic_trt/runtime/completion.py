"""What becomes of a request, and who is told on the way. Knows neither an engine nor torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arctic_trt.errors import ArcticTrtError
from arctic_trt.runtime.chooser import TokenLogprobs
from arctic_trt.runtime.detokenizer import OnPiece

if TYPE_CHECKING:
    from torch import Tensor

CANCELLED = "cancelled"

OnToken = Callable[[int, int], None]
OnSettled = Callable[[int, list[int], tuple[TokenLogprobs, ...] | None], None]
OnError = Callable[[int, ArcticTrtError], None]
OnPromptLogits = Callable[[int, int, "Tensor"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What became of one request; ``token_ids`` are the generated ones, with the end token if it came to one.

    ``finish_reason`` is ``stop``, ``length`` or ``cancelled``; ``logprobs`` are of ``token_ids``, if they were wanted.
    """

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...] | None = None


OnDone = Callable[[int, Completion], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """Who is told while generation goes on, always with the request's index first.

    Of a piece of text that has become certain, of each token as it is chosen, of the completion, and of prompt logits
    (request, first position, [W, V]). ``on_settled`` is told of tokens, and their log probabilities if they were wanted, once the
    text of all tokens so far is out and more are to come. With ``on_error`` a request whose next token cannot be chosen is taken
    out and the others go on; without it, that is raised.
    """

    on_piece: OnPiece = lambda index, piece: None
    on_token: OnToken = lambda index, token: None
    on_settled: OnSettled = lambda index, tokens, logprobs: None
    on_done: OnDone = lambda index, completion: None
    on_error: OnError | None = None
    on_prompt_logits: OnPromptLogits = lambda index, start, logits_WV: None

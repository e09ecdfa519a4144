"""The model ``arctic_trt`` of EleutherAI's lm-evaluation-harness: its requests, answered by an engine.

Importing this module registers the model and needs the package lm-eval, so it is itself imported only where the harness runs.
What the harness leaves to a model is decided here: which tokens a text becomes, and what is done with one that is too long.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from arctic_trt.errors import UsageError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.detokenizer import Detokenizer, settled_ids
from arctic_trt.runtime.device import plan_harness_device
from arctic_trt.runtime.open_engine import check_engine, open_engine
from arctic_trt.runtime.requests import Request, check_vocabulary, find_end_ids
from arctic_trt.runtime.sampler import Sampling, plan_sampling
from arctic_trt.runtime.scoring import Continuation

NAME = "arctic_trt"
BATCHES_AT_A_TIME = 4  # of the engine's largest batch: few sequences wait for the last one, and a cache is never far behind
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
WITHOUT_EFFECT: dict[str, Any] = {"num_beams": 1}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How the texts of one task are generated."""

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling


@register_model(NAME)
class ArcticTrtLM(TemplateLM):  # type: ignore[misc]
    """An engine as the harness sees it. The harness opens a model and never closes it: call ``engines.close()`` at the end."""

    engines: ClassVar[ExitStack] = ExitStack()

    def __init__(
        self,
        engine_dir: str | None = None,
        tokenizer_dir: str | None = None,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = True,
        prefix_token_id: int | None = None,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        """Open the engine; the parameters are the keys of ``--model_args``, and what the harness always adds to them.

        ``max_length`` shortens the engine's window, ``max_gen_toks`` is for tasks that do not say. Without ``add_bos_token``
        texts are taken as they are. ``prefix_token_id`` precedes what nothing precedes: by default the tokenizer's own choice.
        Raises :class:`UsageError` for arguments that do not fit, and what :func:`open_engine` and :class:`Tokenizer` raise.
        """
        super().__init__()
        if engine_dir is None or unknown:
            raise UsageError(
                f"--model_args has {', '.join(sorted(unknown)) or 'no engine_dir'}, expected engine_dir, and perhaps "
                "tokenizer_dir, max_length, max_gen_toks, add_bos_token, prefix_token_id and seed.",
                "For example: --model_args engine_dir=arctic-engine,tokenizer_dir=snowflake-arctic-instruct.",
            )
        if str(batch_size) not in ("None", "1", "auto") or max_batch_size is not None:
            logger.warning("--batch_size: without effect, the engine fills its batches itself, up to the size it was built for.")
        directory = Path(str(engine_dir if tokenizer_dir is None else tokenizer_dir))
        self._text = Tokenizer(directory)
        self.tokenizer = self._text.hf
        self._end_ids = frozenset(find_end_ids(None, self._text, directory))
        self._settled = settled_ids(self._text)
        self._prefix = _first_token(self._text) if prefix_token_id is None else prefix_token_id
        self._openings = tuple(filter(None, (self.tokenizer.decode([self._prefix]), self.tokenizer.bos_token)))
        self._max_gen_toks, self._seed, self._add_bos = max_gen_toks, seed, add_bos_token
        limits = check_engine(Path(str(engine_dir))).build_config
        self._max_length = _within(max_length, limits.max_seq_len)
        self._window = min(self._max_length, limits.max_input_len)
        self._engine = open_engine(Path(str(engine_dir)), device=plan_harness_device(device))
        self.engines.callback(self._engine.close)

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is given as its context."""
        return self._prefix

    @property
    def max_length(self) -> int:
        """Tokens of a sequence, at most."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where the task does not say."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """Distinguishes prompts that the harness keeps: they depend on the chat template and on nothing else of a tokenizer."""
        template = str(self.tokenizer.chat_template).encode()
        return f"{NAME}-{hashlib.sha256(template).hexdigest()[:16]}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; without ``add_generation_prompt`` its last message is to be continued."""
        return self._text.render_chat(chat_history, reply=add_generation_prompt, unfinished=not add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; unless the caller decides, ``<s>`` precedes it where it does not begin with a control token already."""
        if add_special_tokens is None:
            add_special_tokens = self._add_bos and not string.startswith(self._openings)
        return self._text.encode(string) if add_special_tokens else self._text.encode_bare(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, after the prefix token, in windows that score every token once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            tokens = tokens[tokens[:1] == [self._prefix] :]
            for window in get_rolling_token_windows(tokens, self._prefix, max_seq_len=self._window, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Scores of (key of the cache or None, context, continuation), the longest computed first."""
        continuations = [plan_continuation(key, context, text, self._window) for key, context, text in requests]
        cut = sum(len(c.tokens) < len(context) + len(text) for c, (_, context, text) in zip(continuations, requests, strict=True))
        self._warn_of_cuts(cut, len(requests))
        order = sorted(range(len(requests)), key=lambda i: (-len(continuations[i].tokens), continuations[i].tokens))
        answers: dict[int, tuple[float, bool]] = {}
        for batch in self._batches(order, "Scoring", disable_tqdm):
            scores = self._engine.score([continuations[i] for i in batch])
            for i, score in zip(batch, scores, strict=True):
                answers[i] = score.log_prob, score.greedy
                if requests[i][0] is not None:  # a part of a longer text is kept with the whole
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return [answers[i] for i in range(len(requests))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to and without the first of the task's ``until``."""
        prompts = [self.tok_encode(request.args[0]) or [self._prefix] for request in requests]
        for index, prompt in enumerate(prompts):
            check_vocabulary(index, prompt, self._engine.vocab_size)
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        plans = [plan_generation(requests[members[0]].args[1], self._max_gen_toks, self._seed) for members in alike.values()]
        texts: dict[int, str] = {}
        for plan, members in zip(plans, alike.values(), strict=True):
            room = self._room(plan)
            self._warn_of_cuts(sum(len(prompts[index]) > room for index in members), len(members))
            order = sorted(members, key=lambda index: -len(prompts[index]))
            for batch in self._batches(order, "Generating", disable_tqdm):
                generated = self._generate([(index, prompts[index][-room:]) for index in batch], plan)
                for index, text in zip(batch, generated, strict=True):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return [texts[index] for index in range(len(requests))]

    def _generate(self, prompts: list[tuple[int, list[int]]], plan: Generation) -> list[str]:
        """Texts of (place among all requests, which decides what is drawn for it, and its prompt)."""
        control = set(self.tokenizer.all_special_tokens)  # they end a text and are never part of it
        end_ids = self._end_ids | {self.tokenizer.convert_tokens_to_ids(word) for word in plan.until if word in control}
        completions = self._engine.complete(
            [
                Request(
                    index=index,
                    prompt=tuple(ids),
                    max_new_tokens=plan.max_new_tokens,
                    sampling=plan.sampling,
                    end_ids=end_ids,
                    stop_words=plan.until,
                )
                for index, ids in prompts
            ],
            detokenizer=partial(Detokenizer, self._text.decode, self._settled),
        )
        return [completion.text for completion in completions]

    def _room(self, plan: Generation) -> int:
        room = min(self._max_length - plan.max_new_tokens, self._window)
        if room < 1:
            raise UsageError(
                f"max_gen_toks={plan.max_new_tokens} leaves no room for a prompt in {self._max_length} tokens.",
                "Give a smaller one: --gen_kwargs max_gen_toks=N, or --model_args max_gen_toks=N where the task says nothing.",
            )
        return room

    def _batches(self, order: Sequence[int], task: str, disable_tqdm: bool) -> Iterator[Sequence[int]]:
        size = BATCHES_AT_A_TIME * self._engine.limits.max_batch_size
        with tqdm(total=len(order), desc=task, disable=disable_tqdm) as progress:
            for begin in range(0, len(order), size):
                yield order[begin : begin + size]
                progress.update(len(order[begin : begin + size]))

    def _warn_of_cuts(self, cut: int, total: int) -> None:
        if cut:
            logger.warning(
                "%d of %d requests do not fit into %d tokens: their beginnings are left out.", cut, total, self._max_length
            )


def plan_continuation(what: object, context: list[int], text: list[int], window: int) -> Continuation:
    """``text`` after the end of ``context``, of which ``window`` tokens are fed, as many as the engine takes.

    Raises :class:`UsageError` naming ``what`` if ``text`` has no token of its own, or more than can be predicted.
    """
    if not 1 <= len(text) <= window:
        raise UsageError(
            f"The continuation of {what!r} has {len(text)} tokens, expected 1 to {window}.",
            "Without any, its text is part of the context's last token.",
        )
    tokens = (context + text)[-(window + 1) :]
    return Continuation(tuple(tokens), len(tokens) - len(text))


def plan_generation(kwargs: dict[str, Any], default_max_gen_toks: int, seed: int) -> Generation:
    """What a task's ``generation_kwargs`` ask for; raises :class:`UsageError` for those that the engine does not have."""
    given: dict[str, Any] = {**normalize_gen_kwargs(kwargs, default_max_gen_toks)}
    until, tokens, do_sample = given.pop("until"), given.pop("max_gen_toks"), given.pop("do_sample")
    choices = {key: given.pop(key, None) for key in SAMPLING}
    unknown = {key: value for key, value in given.items() if WITHOUT_EFFECT.get(key) != value}
    words = [word for word in until if word]
    if unknown or tokens < 1 or not all(isinstance(word, str) for word in words):
        wrong = unknown or ({"max_gen_toks": tokens} if tokens < 1 else {"until": until})
        raise UsageError(
            f"generation_kwargs has {', '.join(f'{key}={value!r}' for key, value in wrong.items())}, which the engine cannot do.",
            f"It knows until (texts), max_gen_toks (1 or more), do_sample, {', '.join(SAMPLING)}.",
        )
    if do_sample and choices["temperature"] is None:
        choices["temperature"] = 1.0
    chosen = choices if do_sample else {"repetition_penalty": choices["repetition_penalty"]}
    return Generation(until=tuple(words), max_new_tokens=tokens, sampling=plan_sampling(**chosen, seed=seed))


def _within(max_length: int | None, limit: int) -> int:
    if max_length is not None and not 2 <= max_length <= limit:
        raise UsageError(f"max_length={max_length} is out of range, expected 2 to {limit}, the engine's --max_seq_len.")
    return limit if max_length is None else max_length


def _first_token(tokenizer: Tokenizer) -> int:
    """What the tokenizer puts before a text, which is not what Arctic's configuration calls its bos token."""
    ids = [*tokenizer.encode(""), tokenizer.hf.bos_token_id, tokenizer.hf.eos_token_id]
    return next(int(token) for token in ids if token is not None)

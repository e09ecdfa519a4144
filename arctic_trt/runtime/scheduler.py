"""Which tokens of which sequences are computed next, and where their keys and values go. Nothing here computes.

Every step takes one token of each sequence that is decoding, and fills up with parts of prompts. First come is first served:
whoever came earlier gets blocks of the cache earlier, at the cost of the youngest if need be. A sequence that loses its blocks
waits in front, keeps its tokens, and is computed again.

Where the ranks choose tokens by themselves, the next step can be planned before those of the last one are known. A sequence
whose last token can only be its last one leaves; of all others that token is computed, and it may turn out that nobody needed it.
No block is found by others before all of its tokens are known.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from arctic_trt.runtime.blocks import BlockPool, KvRoom, content_key
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.step import UNKNOWN, Choice, Chunk, Step

PROMPT_LOGITS_A_STEP = 1024  # a step's logits are a [W, V] array: 131 MB at Arctic's vocabulary


@dataclass(slots=True, eq=False)
class Sequence:
    """A request under way: ``tokens`` is the prompt and what was generated, of which ``computed`` are in the cache.

    After them come as many ``unknown`` ones as the ranks have chosen since, by what ``choose`` told them; it is None where they
    cannot. ``done`` says that nothing is wanted any more. What is computed is in ``blocks``, of which the ranks know the first
    ``assigned``, and the full ones are called ``keys``. The prompt's positions before ``logits_from`` have no logits to give any
    more.
    """

    request: Request
    tokens: list[int]
    logits_from: int
    choose: Callable[[], Choice] | None = None
    unknown: int = 0
    done: bool = False
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    assigned: int = 0
    keys: list[bytes] = field(default_factory=list)

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    def generated_from(self, begin: int) -> list[int]:
        """The generated tokens without the first ``begin``."""
        return self.tokens[len(self.request.prompt) + begin :]

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def length(self) -> int:
        """Of all tokens, known and unknown."""
        return len(self.tokens) + self.unknown

    @property
    def ready(self) -> bool:
        """All tokens are computed: the logits of the last one decide about the next."""
        return self.computed == self.length

    @property
    def owes_prompt_logits(self) -> bool:
        """Then nothing has been generated yet."""
        return self.logits_from < len(self.request.prompt)

    @property
    def first_wanted(self) -> int:
        """The first position whose logits are wanted, which has to be computed."""
        return self.logits_from if self.owes_prompt_logits else self.length - 1

    def learn(self, token: int) -> None:
        """Add the next token, which was unknown if the ranks chose it."""
        self.tokens.append(token)
        self.unknown = max(0, self.unknown - 1)

    def key(self, block: int, size: int) -> bytes:
        """Names the content of a full block of ``size`` positions."""
        while len(self.keys) <= block:
            begin = len(self.keys) * size
            self.keys.append(content_key(self.keys[-1] if self.keys else b"", self.tokens[begin : begin + size]))
        return self.keys[block]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Sequences and blocks now, and what there was since the start.

    ``batch_size`` is of the last step; there were ``steps``, tokens computed, tokens found in the cache instead, preemptions.
    """

    waiting: int
    active: int
    batch_size: int
    blocks: int
    blocks_in_use: int
    blocks_cached: int
    steps: int
    computed_tokens: int
    reused_tokens: int
    preemptions: int


@dataclass(slots=True)
class _Budget:
    """What is left of a step, for prompts."""

    tokens: int
    prompt_logits: int = PROMPT_LOGITS_A_STEP


class Scheduler:
    """Sequences waiting and active, both in the order in which they came, and the blocks of the cache.

    At most ``max_batch_size`` are active, and a step has at most ``max_num_tokens`` tokens. Each sequence has to fit into
    ``room`` alone.
    """

    def __init__(self, room: KvRoom, *, max_batch_size: int, max_num_tokens: int) -> None:
        self._room = room
        self._pool = BlockPool(room.num_blocks)
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._active: dict[int, Sequence] = {}
        self._ending: dict[int, Sequence] = {}
        self._at_length: list[Sequence] = []
        self._freed: list[int] = []
        self._max_active = min(max_batch_size, max_num_tokens)
        self._max_num_tokens = max_num_tokens
        self._batch_size = self._steps = self._computed = self._reused = self._preemptions = 0

    @property
    def stats(self) -> Stats:
        pool = self._pool
        return Stats(
            waiting=len(self._waiting),
            active=len(self._active),
            batch_size=self._batch_size,
            blocks=pool.num_blocks,
            blocks_in_use=pool.num_blocks - pool.num_available,
            blocks_cached=pool.num_cached,
            steps=self._steps,
            computed_tokens=self._computed,
            reused_tokens=self._reused,
            preemptions=self._preemptions,
        )

    def add(self, request: Request, choose: Callable[[], Choice] | None = None) -> None:
        """Let a request wait for its turn. ``choose`` is asked once for each token that the ranks shall choose by themselves."""
        logits_from = request.logits_from if request.prompt_logits else len(request.prompt)
        self._waiting[request.index] = Sequence(request, list(request.prompt), logits_from, choose)

    def sequence(self, index: int) -> Sequence:
        """The sequence of request ``index``, waiting, active, or with its last token under way."""
        return self._active.get(index) or self._ending.get(index) or self._waiting[index]

    def next_step(self) -> Step | None:
        """The next step, None when there are no sequences. Have it computed, and :meth:`advance`, before asking again.

        Tokens that a step chose must be known before the next but one is asked for.
        """
        self._retire()
        self._admit()
        if not self._active:
            return None
        decoding = {index for index, sequence in self._active.items() if sequence.length - sequence.computed == 1}
        budget = _Budget(self._max_num_tokens - len(decoding))
        chunks = []
        for index, sequence in list(self._active.items()):
            if index in self._active:  # an older one may just have taken its blocks
                chunk = self._plan_chunk(sequence, _Budget(1) if index in decoding else budget)
                chunks += [chunk] if chunk else []
        if not chunks:  # the oldest could take the blocks of all others, so that it would have gone on
            raise RuntimeError("a sequence does not fit into the KV cache alone")
        freed, self._freed = tuple(self._freed), []
        self._batch_size, self._steps = len(chunks), self._steps + 1
        return Step(chunks=tuple(chunks), freed=freed)

    def advance(self, chunk: Chunk) -> Sequence:
        """Note that ``chunk`` has been computed, or will be before anything that is asked for later; returns its sequence."""
        sequence = self._active[chunk.sequence]
        sequence.computed += len(chunk.tokens)
        sequence.logits_from = max(sequence.logits_from, sequence.computed)
        self._computed += len(chunk.tokens)
        if chunk.choice is not None:
            sequence.unknown += 1
            if sequence.length == len(sequence.request.prompt) + sequence.request.max_new_tokens:
                self._at_length.append(sequence)
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its full blocks may still be found."""
        index = sequence.request.index
        sequence.done = True
        self._computed -= sequence.unknown  # that those before them were computed is of no use to anybody
        if self._ending.pop(index, None) is None and self._waiting.pop(index, None) is None:
            del self._active[index]
            sequence.computed -= sequence.unknown
            self._give_back(sequence)

    def _retire(self) -> None:
        """Take the places of sequences of which nothing has to be computed any more, though the last token is still unknown."""
        leaving, self._at_length = self._at_length, []
        for sequence in leaving:
            if not sequence.done:
                self._ending[sequence.request.index] = self._active.pop(sequence.request.index)
                self._give_back(sequence)

    def _admit(self) -> None:
        """Make the oldest that wait active, while what they need leaves the active ones what they need next."""
        if not self._waiting:
            return
        spare = self._pool.num_available - sum(self._needs(sequence) for sequence in self._active.values())
        while self._waiting and len(self._active) < self._max_active:
            index, sequence = next(iter(self._waiting.items()))
            spare -= self._needs(sequence) - self._shared_now(sequence)
            if spare < 0 and self._active:
                return
            self._active[index] = self._waiting.pop(index)

    def _needs(self, sequence: Sequence) -> int:
        """Blocks that a sequence lacks to compute all its tokens and a block's worth more, if it can come to that."""
        tokens = min(sequence.length + self._room.block_tokens, sequence.request.num_cached)
        return max(0, self._room.blocks_for(tokens) - len(sequence.blocks))

    def _shared_now(self, sequence: Sequence) -> int:
        """Blocks in use by others that a waiting sequence would share."""
        count = 0
        for block in range(sequence.first_wanted // self._room.block_tokens):
            found = self._pool.find(sequence.key(block, self._room.block_tokens))
            if found is None:
                break
            count += self._pool.references(found) > 0
        return count

    def _plan_chunk(self, sequence: Sequence, budget: _Budget) -> Chunk | None:
        self._reuse(sequence)
        start = sequence.computed
        unwanted = max(0, sequence.first_wanted - start)
        count = min(sequence.length - start, budget.tokens)
        if sequence.owes_prompt_logits:
            count = min(count, unwanted + budget.prompt_logits)
        count = self._make_room(sequence, count)
        if not count:
            return None
        logits_from = min(count, unwanted)
        budget.tokens -= count
        if sequence.owes_prompt_logits:
            budget.prompt_logits -= count - logits_from
        self._publish(sequence, start + count)
        assigned, sequence.assigned = sequence.assigned, len(sequence.blocks)
        known = tuple(sequence.tokens[start : start + count])
        return Chunk(
            sequence=sequence.request.index,
            start=start,
            tokens=known + (UNKNOWN,) * (count - len(known)),
            blocks=tuple(sequence.blocks[assigned:]),
            logits_from=logits_from,
            choice=sequence.choose() if sequence.choose and start + count == sequence.length else None,
        )

    def _reuse(self, sequence: Sequence) -> None:
        """Where a sequence is at the end of its blocks, go on in those that others fill or have filled with the same."""
        size = self._room.block_tokens
        while sequence.computed == len(sequence.blocks) * size and sequence.computed + size <= sequence.first_wanted:
            block = self._pool.find(sequence.key(len(sequence.blocks), size))
            if block is None:
                return
            self._pool.share(block)
            sequence.blocks.append(block)
            sequence.computed += size
            self._reused += size

    def _make_room(self, sequence: Sequence, count: int) -> int:
        """Take blocks for ``count`` more tokens, from younger sequences if need be; returns for how many there is room."""
        missing = max(0, self._room.blocks_for(sequence.computed + count) - len(sequence.blocks))
        while missing > self._pool.num_available and (youngest := next(reversed(self._active.values()))) is not sequence:
            self._preempt(youngest)
        if missing:
            sequence.blocks += [self._pool.take() for _ in range(min(missing, self._pool.num_available))]
        return min(count, len(sequence.blocks) * self._room.block_tokens - sequence.computed)

    def _publish(self, sequence: Sequence, end: int) -> None:
        """Let full blocks be found, also those that the step now planned fills: a layer stores all before it reads any.

        A block whose last token was unknown when it was filled is found one step later.
        """
        size = self._room.block_tokens
        for block in range(max(0, sequence.computed - 1) // size, min(end, len(sequence.tokens)) // size):
            self._pool.publish(sequence.blocks[block], sequence.key(block, size))

    def _preempt(self, sequence: Sequence) -> None:
        index = sequence.request.index
        self._waiting[index] = self._active.pop(index)
        self._waiting.move_to_end(index, last=False)
        self._preemptions += bool(sequence.blocks)
        self._give_back(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self._publish(sequence, sequence.computed)
        if sequence.assigned:
            self._freed.append(sequence.request.index)
        self._pool.release(sequence.blocks)
        sequence.blocks.clear()
        sequence.computed = sequence.assigned = 0

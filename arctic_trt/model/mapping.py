"""Which rank holds what: tensor, pipeline and expert parallelism by TensorRT-LLM's rules.

Ranks are numbered ``pp_rank * tp_size + tp_rank``. Inside a tensor-parallel group the experts are divided first by expert
(``moe_ep_size`` contiguous blocks) and then by rows of the expert ffn (``moe_tp_size``): ``moe_tp_rank = tp_rank // moe_ep_size``
and ``moe_ep_rank = tp_rank % moe_ep_size``. Layers go to pipeline stages as ``torch.tensor_split`` cuts them: 35 over 2
stages are 18 and 17.
"""

from __future__ import annotations

from dataclasses import dataclass

from arctic_trt.errors import UsageError
from arctic_trt.model.config import ArcticConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """Sizes of the parallel groups; build one with :func:`plan_mapping`, which checks that they fit."""

    tp_size: int
    pp_size: int
    moe_tp_size: int
    moe_ep_size: int

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    def rank(self, rank: int) -> Rank:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} of a world of {self.world_size}")
        return Rank(mapping=self, index=rank)

    def ranks(self) -> list[Rank]:
        return [self.rank(index) for index in range(self.world_size)]

    def layers(self, pp_rank: int, num_layers: int) -> range:
        """The contiguous layers of one stage; earlier stages take the remainder."""
        share, rest = divmod(num_layers, self.pp_size)
        first = pp_rank * share + min(pp_rank, rest)
        return range(first, first + share + (pp_rank < rest))

    def stage_of(self, layer: int, num_layers: int) -> int:
        return next(stage for stage in range(self.pp_size) if layer in self.layers(stage, num_layers))

    def local_layer(self, layer: int, num_layers: int) -> int:
        """Number of ``layer`` within its stage, from 0."""
        return layer - self.layers(self.stage_of(layer, num_layers), num_layers).start

    def as_dict(self) -> dict[str, int]:
        """The portable subset of TensorRT-LLM's ``mapping`` block (its constructor refuses unknown keys)."""
        return {
            "world_size": self.world_size,
            "tp_size": self.tp_size,
            "pp_size": self.pp_size,
            "moe_tp_size": self.moe_tp_size,
            "moe_ep_size": self.moe_ep_size,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One process of the world and its place in each group."""

    mapping: Mapping
    index: int

    @property
    def tp_rank(self) -> int:
        return self.index % self.mapping.tp_size

    @property
    def pp_rank(self) -> int:
        return self.index // self.mapping.tp_size

    @property
    def moe_tp_rank(self) -> int:
        return self.tp_rank // self.mapping.moe_ep_size

    @property
    def moe_ep_rank(self) -> int:
        return self.tp_rank % self.mapping.moe_ep_size

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.mapping.pp_size - 1

    def layers(self, num_layers: int) -> range:
        return self.mapping.layers(self.pp_rank, num_layers)

    def experts(self, num_experts: int) -> range:
        share = num_experts // self.mapping.moe_ep_size
        return range(self.moe_ep_rank * share, (self.moe_ep_rank + 1) * share)

    def kv_heads(self, num_kv_heads: int) -> range:
        """The KV heads of this rank; with more ranks than heads, neighbouring ranks hold the same one."""
        if num_kv_heads >= self.mapping.tp_size:
            share = num_kv_heads // self.mapping.tp_size
            return range(self.tp_rank * share, (self.tp_rank + 1) * share)
        head = self.tp_rank * num_kv_heads // self.mapping.tp_size
        return range(head, head + 1)


def plan_mapping(
    config: ArcticConfig, *, tp_size: int = 1, pp_size: int = 1, moe_tp_size: int | None = None, moe_ep_size: int | None = None
) -> Mapping:
    """Complete and check the parallel sizes for ``config``; raises :class:`UsageError` naming the flag that does not fit.

    A missing MoE size follows from ``moe_tp_size * moe_ep_size == tp_size``; with both missing the experts' rows are divided.
    """
    given = {"--tp_size": tp_size, "--pp_size": pp_size, "--moe_tp_size": moe_tp_size, "--moe_ep_size": moe_ep_size}
    for flag, size in given.items():
        if size is not None and size < 1:
            raise UsageError(f"{flag} {size} is not a positive number.")
    moe_tp, moe_ep = _complete_moe_sizes(tp_size, moe_tp_size, moe_ep_size)
    kv_heads = config.num_key_value_heads
    divisions = [
        ("--tp_size", tp_size, "num_attention_heads", config.num_attention_heads),
        ("--tp_size", tp_size, "hidden_size", config.hidden_size),
        ("--moe_tp_size", moe_tp, "intermediate_size", config.intermediate_size),
        ("--moe_ep_size", moe_ep, "num_local_experts", config.num_local_experts),
    ]
    for flag, size, key, value in divisions:
        if value % size:
            raise UsageError(f"{flag} {size} does not divide {key}={value}.", f"Choose a divisor of {value}.")
    if kv_heads % tp_size and tp_size % kv_heads:
        raise UsageError(
            f"--tp_size {tp_size} neither divides num_key_value_heads={kv_heads} nor is a multiple of it.",
            f"Choose a divisor or a multiple of {kv_heads}.",
        )
    if pp_size > config.num_hidden_layers:
        raise UsageError(f"--pp_size {pp_size} exceeds num_hidden_layers={config.num_hidden_layers}.")
    return Mapping(tp_size=tp_size, pp_size=pp_size, moe_tp_size=moe_tp, moe_ep_size=moe_ep)


def _complete_moe_sizes(tp_size: int, moe_tp_size: int | None, moe_ep_size: int | None) -> tuple[int, int]:
    moe_tp = moe_tp_size or (tp_size // moe_ep_size if moe_ep_size else tp_size)
    moe_ep = moe_ep_size or (tp_size // moe_tp if moe_tp else 1)
    if moe_tp * moe_ep != tp_size:
        raise UsageError(
            f"--moe_tp_size ({moe_tp_size or 'not given'}) times --moe_ep_size ({moe_ep_size or 'not given'}) "
            f"is not --tp_size {tp_size}.",
            "Leave one of the two out to have it follow.",
        )
    return moe_tp, moe_ep


def padded_vocab(vocab_size: int, tp_size: int) -> int:
    """The vocabulary rounded up so that every rank holds equally many rows."""
    return -(-vocab_size // tp_size) * tp_size

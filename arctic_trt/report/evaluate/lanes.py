"""Lanes: the same tokens on several ways through a model, side by side, while each weight is read once.

A lane is a choice, for each kind of site, between the original and what is compared with it. The reference takes everything from
the original, the candidate everything from the checkpoint; what is between them shows what each kind of site costs.
Everything between projections is float32, as in the engine.
Legend: B batch, T tokens, D hidden, N heads, K KV heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch import Tensor

from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.layer import Observe, Routing, apply_rotary, rms_norm, rotary_tables, route
from arctic_trt.quantize.stream import Unit, WeightStream
from arctic_trt.report.evaluate.sources import KERNELS, DenseProjections, ExpertProjections, Source
from arctic_trt.runtime.kernels import attend, rounded

ATTENTION, RESIDUAL_MLP, EXPERTS, KV_CACHE = SITES = ("attention", "residual_mlp", "experts", "kv_cache")
REFERENCE, CANDIDATE = "reference", "candidate"
Weights = TypeVar("Weights")


@dataclass(frozen=True, slots=True)
class Pair(Generic[Weights]):
    """The same part of a layer from both sources; one of them may be absent."""

    reference: Weights | None
    candidate: Weights | None

    def pick(self, *, from_candidate: bool) -> Weights:
        """One of them, which must be there: lanes are planned for the sources that there are."""
        picked = self.candidate if from_candidate else self.reference
        if picked is None:
            raise RuntimeError(f"a lane asks for the {CANDIDATE if from_candidate else REFERENCE}, which was not given")
        return picked


class PairedStream:
    """The streams of both sources, one of which may be absent, taken in step. A context manager around them."""

    def __init__(self, reference: Source | None, candidate: Source | None, layers: range, experts: range, depth: int) -> None:
        self._reference = WeightStream(reference, layers, experts, depth) if reference else None
        self._candidate = WeightStream(candidate, layers, experts, depth) if candidate else None
        self._stack = ExitStack()

    def __enter__(self) -> PairedStream:
        for stream in (self._reference, self._candidate):
            if stream:
                self._stack.enter_context(stream)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def dense(self, layer: int) -> Unit[Pair[DenseProjections]]:
        """Both sources' dense part of ``layer``."""
        return _pair(
            self._reference.dense(layer) if self._reference else None, self._candidate.dense(layer) if self._candidate else None
        )

    def expert(self, layer: int, expert: int) -> Unit[Pair[ExpertProjections]]:
        """Both sources' ``expert`` of ``layer``."""
        return _pair(
            self._reference.expert(layer, expert) if self._reference else None,
            self._candidate.expert(layer, expert) if self._candidate else None,
        )


def _pair(reference: Unit[Weights] | None, candidate: Unit[Weights] | None) -> Unit[Pair[Weights]]:
    """One unit of both; releasing it releases them."""

    def release() -> None:
        for unit in (reference, candidate):
            if unit is not None:
                unit.release()

    return Unit(Pair(reference.weights if reference else None, candidate.weights if candidate else None), release)


@dataclass(frozen=True, slots=True)
class Lane:
    """A name, and the kinds of site that come from the candidate; None: all, norms and router included.

    A ``probe`` starts every layer from the reference's hidden states: what it differs by afterwards is that layer's own doing.
    """

    name: str
    sites: frozenset[str] | None
    probe: bool = False


def plan_lanes(*, reference: bool, candidate: bool, sensitivity: bool) -> list[Lane]:
    """The lanes that a question needs: the reference first, then the candidate, then each kind of site by itself."""
    lanes = [Lane(REFERENCE, frozenset())] if reference else []
    lanes += [Lane(CANDIDATE, None)] if candidate else []
    sites = SITES if sensitivity else ()
    return [*lanes, *(Lane(site, frozenset({site})) for site in sites), *(Lane(probe_of(s), frozenset({s}), True) for s in sites)]


def probe_of(site: str) -> str:
    """Name of the lane that measures a kind of site layer by layer."""
    return f"{site}-probe"


class EngineArithmetic:
    """A layer as the engine computes it; hidden states are float32."""

    def __init__(self, config: ArcticConfig, sites: Iterable[str] | None) -> None:
        self._config = config
        self._sites = None if sites is None else frozenset(sites)

    def dense(self, weights: Pair[DenseProjections], x_BTD: Tensor, observe: Observe) -> tuple[Tensor, Tensor, Routing]:
        picked, eps = pick_dense(weights, self._sites), self._config.rms_norm_eps
        x_TD = x_BTD.flatten(0, 1)
        sum_TD = x_TD + self._attention(rms_norm(x_TD, picked.small.input_norm, eps), picked, x_BTD.shape[0])
        moe_x_TD = rms_norm(x_TD, picked.small.post_norm, eps)
        routing = route(moe_x_TD, picked.small.router, self._config.num_experts_per_tok)
        mlp_x_TD = rms_norm(sum_TD, picked.small.residual_norm, eps)
        y_TD = sum_TD + KERNELS.gated_mlp(mlp_x_TD, picked.residual_fc, picked.residual_proj)
        return y_TD.view_as(x_BTD), moe_x_TD, routing

    def expert(self, weights: Pair[ExpertProjections], x_TD: Tensor, observe: Observe) -> Tensor:
        picked = weights.pick(from_candidate=self._sites is None or EXPERTS in self._sites)
        return KERNELS.gated_mlp(x_TD, picked.fc, picked.proj)

    def _attention(self, x_TD: Tensor, picked: DenseProjections, batch: int) -> Tensor:
        """Causal attention over ``batch`` sequences of equal length, [T, D]."""
        config, tokens = self._config, len(x_TD) // batch
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = KERNELS.linear(x_TD, picked.qkv).view(batch, tokens, heads + 2 * kv_heads, -1)
        cos, sin = (table[:, None] for table in rotary_tables(torch.arange(tokens), config.head_dim, config.rope_theta))
        rotated, v_BTKH = apply_rotary(qkv[:, :, : heads + kv_heads], cos, sin), qkv[:, :, heads + kv_heads :]
        q_BTNH, k_BTKH = rotated[:, :, :heads], rotated[:, :, heads:]
        k_BTKH, v_BTKH = (_through_cache(x, picked.kv_scale) for x in (k_BTKH, v_BTKH))
        sequences = zip(q_BTNH, k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2), strict=True)
        return KERNELS.linear(torch.cat([attend(q, k, v, 0) for q, k, v in sequences]), picked.dense)


def pick_dense(pair: Pair[DenseProjections], sites: frozenset[str] | None) -> DenseProjections:
    """The projections of a lane; ``sites`` come from the candidate, the others from the reference."""
    picked = pair.pick(from_candidate=sites is None)
    if sites is None or sites.isdisjoint({ATTENTION, RESIDUAL_MLP, KV_CACHE}):
        return picked
    candidate = pair.pick(from_candidate=True)
    if ATTENTION in sites:
        picked = replace(picked, qkv=candidate.qkv, dense=candidate.dense)
    if RESIDUAL_MLP in sites:
        picked = replace(picked, residual_fc=candidate.residual_fc, residual_proj=candidate.residual_proj)
    if KV_CACHE in sites:
        picked = replace(picked, kv_scale=candidate.kv_scale)
    return picked


def _through_cache(x: Tensor, scale: Tensor | None) -> Tensor:
    """Keys or values as attention reads them back."""
    return x if scale is None else rounded(x, scale) * scale

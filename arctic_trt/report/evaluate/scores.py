"""What the last hidden states say about a model: the log-probability of each next token, and how far two models are apart.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NO_TARGET = -1


@dataclass(frozen=True, slots=True)
class Scores:
    """Of each predicted token, float64 [T]: its negative log-likelihood in nats, and, against a reference, KL and agreement.

    ``kl_T`` is KL(reference || this) in nats over the whole vocabulary, ``agree_T`` 1 where both find the same token likeliest.
    """

    nll_T: Tensor
    kl_T: Tensor | None = None
    agree_T: Tensor | None = None


def next_tokens(batches: Sequence[Tensor]) -> Tensor:
    """For every token of ``batches`` [B, T] in their order, the one that follows it in its sample, int64; -1 after the last."""
    return torch.cat([F.pad(ids[:, 1:], (0, 1), value=NO_TARGET).flatten() for ids in batches])


def score(logits_TV: Tensor, target_T: Tensor, reference_TV: Tensor | None = None) -> Scores:
    """Compare float32 logits with the tokens that came, and with the logits of a reference."""
    log_p_TV = F.log_softmax(logits_TV.float(), -1)
    nll_T = -log_p_TV.gather(1, target_T[:, None])[:, 0].double()
    if reference_TV is None:
        return Scores(nll_T)
    log_r_TV = F.log_softmax(reference_TV.float(), -1)
    kl_T = (log_r_TV.exp() * (log_r_TV - log_p_TV)).sum(-1, dtype=torch.float64).clamp_min(0)
    return Scores(nll_T, kl_T, (logits_TV.argmax(-1) == reference_TV.argmax(-1)).double())


def join_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of consecutive parts as one."""
    kl = [part.kl_T for part in parts if part.kl_T is not None]
    agree = [part.agree_T for part in parts if part.agree_T is not None]
    return Scores(torch.cat([part.nll_T for part in parts]), torch.cat(kl) if kl else None, torch.cat(agree) if agree else None)


def summarize(scores: Scores) -> dict[str, Any]:
    """Perplexity, and the distance from the reference where there is one; floats, or None for what was not measured."""
    nll = float(scores.nll_T.mean())
    summary: dict[str, Any] = {"nll": nll, "perplexity": math.exp(nll) if nll < 700 else math.inf}
    kl_T, agree_T = scores.kl_T, scores.agree_T
    return summary | {
        "kl_mean": None if kl_T is None else float(kl_T.mean()),
        "kl_p99": None if kl_T is None else float(kl_T.sort().values[round(0.99 * (len(kl_T) - 1))]),
        "kl_max": None if kl_T is None else float(kl_T.max()),
        "top1_agreement": None if agree_T is None else float(agree_T.mean()),
    }


def relative_error(x_TD: Tensor, reference_TD: Tensor) -> Tensor:
    """Of each token, ||x - reference|| / ||reference||, float64 [T].

    By token, because a few tokens (the first of each sample above all) have states far larger than all others.
    """
    length_T: Tensor = reference_TD.double().norm(dim=-1)
    distance_T: Tensor = (x_TD - reference_TD).double().norm(dim=-1)
    return distance_T / length_T.clamp_min(1e-30)

"""What an evaluation will do: its inputs checked, its memory fitted. Nothing is written here."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arctic_trt import __version__
from arctic_trt.checkpoint.header import digest_headers
from arctic_trt.checkpoint.output_dir import check_space
from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.machine import available_cores, cache_dir
from arctic_trt.model.config import ArcticConfig
from arctic_trt.quantize.data import find_dataset, read_samples
from arctic_trt.quantize.fingerprint import digest
from arctic_trt.quantize.memory import BASE_BYTES, EXPERT_ROWS, MAX_DEPTH, MIN_DEPTH, MemoryPlan, default_budget, parse_size
from arctic_trt.recipes.evaluate import EvaluateRecipe
from arctic_trt.report.evaluate.lanes import Lane, plan_lanes
from arctic_trt.report.evaluate.sensitivity import parse_budget
from arctic_trt.report.evaluate.sources import CheckpointSource, ModelSource, Source, open_source
from arctic_trt.report.verify.run import SIZES

logger = logging.getLogger(__name__)
SCORED_ROWS = 512
"""Tokens whose logits over the whole vocabulary are in memory at once, for each thread.

With Arctic's vocabulary that is 66 MB. Blocks of less than 32 MiB are not given back by glibc's allocator, whose arenas, one a
thread, then grow to several times what is in use.
"""


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """An evaluation whose inputs have all been checked; at least one of the two sources is there.

    ``budget_bytes`` is what the checkpoint may grow by, where the sensitivity is asked for.
    """

    recipe: EvaluateRecipe
    reference: Source | None
    candidate: Source | None
    data: Path
    samples: list[list[int]]
    lanes: list[Lane]
    memory: MemoryPlan
    work_dir: Path
    budget_bytes: int
    fingerprint: dict[str, Any]

    @property
    def sources(self) -> list[Source]:
        return [source for source in (self.reference, self.candidate) if source is not None]

    @property
    def config(self) -> ArcticConfig:
        return self.sources[0].config

    @property
    def subject(self) -> Source:
        """What is evaluated: the first argument of the command."""
        return self.sources[-1]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.samples))

    def close(self) -> None:
        for source in self.sources:
            source.close()


def plan_evaluation(recipe: EvaluateRecipe) -> EvaluationPlan:
    """Check sources, data and memory, without reading weights or writing anything.

    Raises :class:`UsageError` where the two are not the same model, or the data holds nothing to predict.
    """
    subject = open_source(recipe.path)
    against = open_source(recipe.against) if recipe.against else None
    if against is not None:
        check_same_shape(subject, against)
    check_sensitivity(recipe, subject, against)
    alone = isinstance(subject, ModelSource) and against is None
    reference, candidate = (subject, None) if alone else (against, subject)
    data = find_dataset(recipe.data, flag="--data")
    samples = _read_samples(recipe, data, subject.config)
    lanes = plan_lanes(reference=reference is not None, candidate=candidate is not None, sensitivity=recipe.sensitivity)
    tokens = sum(map(len, samples))
    budget = parse_size(recipe.memory_budget) if recipe.memory_budget else default_budget()
    memory = plan_memory(
        subject.config,
        tokens=tokens,
        batch_tokens=max(map(len, samples)) * recipe.batch_size,
        lanes=len(lanes),
        sources=1 + (against is not None),
        workers=available_cores(1),
        budget_bytes=budget,
    )
    print_ = _fingerprint(recipe, subject, against, samples)
    work_dir = (recipe.work_dir or cache_dir()) / work_name(print_)
    check_space(work_dir, estimate_disk(subject.config, tokens=tokens, lanes=len(lanes), spill=memory.spill))
    growth = parse_budget(recipe.size_budget, sum(path.stat().st_size for path in subject.files)) if recipe.sensitivity else 0
    return EvaluationPlan(recipe, reference, candidate, data, samples, lanes, memory, work_dir, growth, print_)


def check_same_shape(subject: Source, against: Source) -> None:
    """Raise :class:`UsageError` where the two cannot be compared."""
    for key in SIZES:
        mine, theirs = getattr(subject.config, key), getattr(against.config, key)
        if mine != theirs:
            raise UsageError(
                f"{subject.path} has {key} {mine}, {against.path} has {theirs}.", "Give the model that it was made of."
            )


def check_sensitivity(recipe: EvaluateRecipe, subject: Source, against: Source | None) -> None:
    """Raise :class:`UsageError` where ``--sensitivity`` has nothing to choose from, or nothing to choose it by."""
    if not recipe.sensitivity:
        return
    if not isinstance(subject, CheckpointSource) or not subject.checkpoint.quant.fp8 or not isinstance(against, ModelSource):
        raise UsageError(
            "--sensitivity compares an FP8 checkpoint with its original.", "Give the checkpoint, and --against MODEL_DIR."
        )
    if subject.checkpoint.mapping.pp_size > 1:
        raise UsageError(
            f"{subject.path} has {subject.checkpoint.mapping.pp_size} pipeline stages, in which TensorRT-LLM's exclude_modules "
            "cannot name one layer.",
            "Measure a checkpoint with --pp_size 1: its numbers are the same.",
        )


def _read_samples(recipe: EvaluateRecipe, data: Path, config: ArcticConfig) -> list[list[int]]:
    longest = config.max_position_embeddings
    samples = read_samples(
        data,
        limit=recipe.num_samples,
        max_tokens=min(recipe.max_seq_length or longest, longest),
        vocab_size=config.vocab_size,
        tokenizer_dir=recipe.tokenizer_dir or recipe.path,
    )
    kept = [sample for sample in samples if len(sample) > 1]
    if len(kept) < len(samples):
        logger.warning("%d samples of a single token predict nothing and are left out.", len(samples) - len(kept))
    if not kept:
        raise UsageError(f"{data} holds no sample of two tokens or more.", "There is nothing to predict in it.")
    return kept


def _fingerprint(recipe: EvaluateRecipe, subject: Source, against: Source | None, samples: list[list[int]]) -> dict[str, Any]:
    """What the result depends on; two evaluations with the same fingerprint may continue each other's work."""
    return {
        "version": __version__,
        "subject": digest_headers(subject.files),
        "config": digest(subject.config.model_dump()),
        "against": digest_headers(against.files) if against else None,
        "data": digest(samples),
        "batch_size": recipe.batch_size,
        "sensitivity": recipe.sensitivity,
    }


def work_name(fingerprint: dict[str, Any]) -> str:
    """Name of the directory in which the work with this fingerprint is kept until it is done."""
    return f"arctic-trt-eval-{hashlib.sha256(repr(sorted(fingerprint.items())).encode()).hexdigest()[:12]}"


def plan_memory(
    config: ArcticConfig, *, tokens: int, batch_tokens: int, lanes: int, sources: int, workers: int, budget_bytes: int
) -> MemoryPlan:
    """Choose the widest plan within the budget; raises :class:`RefusedError` when even the narrowest does not fit."""
    peak = 0
    for threads in range(workers, 0, -1):
        for spill in (False, True):
            for depth in range(MAX_DEPTH, MIN_DEPTH - 1, -1):
                rows = 0 if spill else lanes * 3 * 4 * tokens * config.hidden_size
                peak = rows + estimate_peak(
                    config, batch_tokens=min(batch_tokens, tokens), sources=sources, workers=threads, depth=depth
                )
                if peak <= budget_bytes:
                    return MemoryPlan(depth, spill, peak, threads)
    raise RefusedError(
        f"The memory budget of {budget_bytes / 2**30:.2f} GiB is too small: this evaluation needs {peak / 2**30:.2f} GiB.",
        "Raise --memory_budget, or lower --max_seq_length.",
    )


def estimate_disk(config: ArcticConfig, *, tokens: int, lanes: int, spill: bool) -> int:
    """Bytes of the hidden states that lie on disk at once: those after two layers, and those that memory has no room for."""
    return (2 + 3 * spill) * lanes * 4 * tokens * config.hidden_size


def estimate_peak(config: ArcticConfig, *, batch_tokens: int, sources: int, workers: int, depth: int) -> int:
    """Peak resident bytes but for the hidden states. Neither layers nor the number of experts appear in it.

    Weights are held in bf16, once more while ranks' parts are merged; a thread has its largest factor in float32, and a few
    activations.
    """
    hidden, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    dense = 2 * (6 * hidden * hidden + 2 * config.kv_size * hidden)
    expert = 2 * 3 * ffn * hidden
    attention = 4 * (batch_tokens * (12 * hidden) + 2 * hidden * hidden)
    moe = 4 * (EXPERT_ROWS * (4 * hidden + 4 * ffn) + 2 * ffn * hidden)
    head = 4 * (vocab * hidden + SCORED_ROWS * vocab * 8)
    ends = 2 * 2 * sources * vocab * hidden
    return BASE_BYTES + max(ends + workers * head, sources * (2 * dense + (depth + 2) * expert) + workers * max(attention, moe))

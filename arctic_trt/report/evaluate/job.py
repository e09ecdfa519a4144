"""The pass of an evaluation: all lanes through one layer after another, each layer recorded, and at last the scores."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arctic_trt.checkpoint.journal import Journal
from arctic_trt.checkpoint.output_dir import OutputDir
from arctic_trt.model.layer import rms_norm
from arctic_trt.quantize.data import plan_batches
from arctic_trt.quantize.rows import FileRows, MemoryRows, Rows, load_rows, save_rows, sync_file
from arctic_trt.quantize.stream import WorkPool
from arctic_trt.quantize.team import Solo
from arctic_trt.quantize.token_pass import Contribution, TokenPass
from arctic_trt.report.evaluate.lanes import REFERENCE, EngineArithmetic, Lane, Pair, PairedStream
from arctic_trt.report.evaluate.plan import SCORED_ROWS, EvaluationPlan
from arctic_trt.report.evaluate.scores import NO_TARGET, Scores, join_scores, next_tokens, relative_error, score
from arctic_trt.report.evaluate.sources import KERNELS, DenseProjections, Ends, ExpertProjections
from arctic_trt.runtime.kernels import Projection

LanePass = TokenPass[Pair[DenseProjections], Pair[ExpertProjections]]
EndsBySource = dict[Path, Ends]
COMPARED_ROWS = 1024
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """After one layer, the mean over tokens of ||h - h_ref|| / ||h_ref|| of every lane but the reference, by lane."""

    layer: int
    errors: dict[str, float]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a pass has found; ``layers`` is empty where there is no reference."""

    scores: dict[str, Scores]
    layers: list[LayerErrors]
    resumed_layers: int
    seconds: float
    bytes_read: int


OnLayer = Callable[[LayerErrors], None]


class EvaluationJob:
    """The pass itself, from the first layer that is not yet committed; ``out`` holds its journal."""

    def __init__(self, plan: EvaluationPlan, out: OutputDir, on_layer: OnLayer) -> None:
        self.plan, self.config, self.on_layer = plan, plan.config, on_layer
        self.out = out
        self.journal = Journal(out.path)
        self.records = self._usable_records() if out.resuming else []
        if out.resuming and not self.records:
            out.start_over()
        self.journal.open()
        self.batches = plan_batches(plan.samples, plan.recipe.batch_size)
        self.pool = WorkPool(plan.memory.workers)
        self.passes = {lane: self._new_pass(lane) for lane in plan.lanes}
        self.reference = next((lane_pass for lane, lane_pass in self.passes.items() if lane.name == REFERENCE), None)

    def run(self) -> Evaluation:
        """All layers that are left, then the scores."""
        began = time.perf_counter()
        layers = [LayerErrors(**record["errors"]) for record in self.records]
        ends = {source.path: source.ends() for source in self.plan.sources}
        self._begin(ends)
        todo = range(len(layers), self.config.num_hidden_layers)
        experts, depth = range(self.config.num_local_experts), self.plan.memory.depth
        with PairedStream(self.plan.reference, self.plan.candidate, todo, experts, depth) as stream:
            for layer in todo:
                layers.append(self._layer(layer, stream))
                self._commit(layers[-1])
                self.on_layer(layers[-1])
        scores = self._score(ends)
        read = sum(source.bytes_read for source in self.plan.sources)
        return Evaluation(scores, layers, len(self.records), time.perf_counter() - began, read)

    def close(self) -> None:
        self.pool.close()
        for lane_pass in self.passes.values():
            lane_pass.close()

    def _usable_records(self) -> list[dict[str, Any]]:
        """What an interrupted run has committed; nothing where it was interrupted while it cleared its work away."""
        records = self.journal.records()
        states = [self.journal.state(len(records) - 1, name) for name in records[-1]["states"]] if records else []
        return records if all(path.exists() for path in states) else []

    def _lasting(self) -> list[tuple[Lane, LanePass]]:
        """The lanes whose hidden states live on from layer to layer."""
        return [(lane, lane_pass) for lane, lane_pass in self.passes.items() if not lane.probe]

    def _new_pass(self, lane: Lane) -> LanePass:
        arithmetic = EngineArithmetic(self.config, lane.sites)
        return TokenPass(self.batches, arithmetic, self.config.num_experts_per_tok, self._new_rows, Solo())

    def _new_rows(self, tokens: int) -> Rows:
        if self.plan.memory.spill:
            return FileRows(tokens, self.config.hidden_size, self.journal.directory, torch.float32)
        return MemoryRows(tokens, self.config.hidden_size, torch.float32)

    def _ends_of(self, lane: Lane, ends: EndsBySource) -> Ends:
        source = self.plan.candidate if lane.sites is None else self.plan.reference
        assert source is not None, "lanes are planned for the sources that there are"
        return ends[source.path]

    def _begin(self, ends: EndsBySource) -> None:
        """Hidden states: restored from the journal, or the embedding of the tokens."""
        if self.records:
            logger.info("Resuming after layer %d of %d.", len(self.records), self.config.num_hidden_layers)
        for lane, lane_pass in self._lasting():
            if self.records:
                last = self.records[-1]
                state = self.journal.state(last["errors"]["layer"], lane.name)
                load_rows(lane_pass.hidden, lane_pass.num_tokens, state, last["states"][lane.name])
            else:
                lane_pass.embed(self._ends_of(lane, ends).embedding)

    def _layer(self, layer: int, stream: PairedStream) -> LayerErrors:
        """One layer of every lane, each weight read once."""
        self._reset_probes()
        dense = stream.dense(layer)
        for lane_pass in self.passes.values():
            lane_pass.enter(layer, dense, self.pool)
        dense.release()
        for lane_pass, contribution in self.pool.each(self._expert_works(layer, stream)):
            lane_pass.add(contribution)
        for lane_pass in self.passes.values():
            lane_pass.leave()
        return LayerErrors(layer, self._compare())

    def _reset_probes(self) -> None:
        for lane, lane_pass in self.passes.items():
            if lane.probe and self.reference:
                for begin, end in _parts(lane_pass.num_tokens, COMPARED_ROWS):
                    lane_pass.hidden.write(begin, self.reference.hidden.read(begin, end))

    def _expert_works(self, layer: int, stream: PairedStream) -> Iterator[Callable[[], tuple[LanePass, Contribution]]]:
        for expert in range(self.config.num_local_experts):
            unit = stream.expert(layer, expert)
            for lane_pass in self.passes.values():
                for visit in lane_pass.visits(expert, unit):
                    yield partial(_of_pass, lane_pass, visit)
            unit.release()

    def _compare(self) -> dict[str, float]:
        """How far every lane is from the reference now."""
        reference = self.reference
        if reference is None:
            return {}
        others = [(lane, lane_pass) for lane, lane_pass in self.passes.items() if lane_pass is not reference]
        parts = _parts(reference.num_tokens, COMPARED_ROWS)
        works = [partial(_error_sum, lane_pass, reference, *part) for _, lane_pass in others for part in parts]
        sums = iter(self.pool.each(works))
        return {lane.name: sum(next(sums) for _ in parts) / reference.num_tokens for lane, _ in others}

    def _commit(self, done: LayerErrors) -> None:
        """Make the hidden states after a layer durable, then record it."""
        states = {}
        for lane, lane_pass in self._lasting():
            path = self.journal.state(done.layer, lane.name)
            states[lane.name] = save_rows(lane_pass.hidden, lane_pass.num_tokens, path)
            sync_file(path)
        self.journal.commit(done.layer, {"states": states, "errors": {"layer": done.layer, "errors": done.errors}})
        self.out.keep = True

    def _score(self, ends: EndsBySource) -> dict[str, Scores]:
        """Every lane's scores over all tokens that have a next one."""
        target_T = next_tokens(self.batches)
        works = [partial(self._score_part, ends, target_T, *part) for part in _parts(len(target_T), SCORED_ROWS)]
        parts = [part for part in self.pool.each(works) if part]
        return {lane.name: join_scores([part[lane.name] for part in parts]) for lane, _ in self._lasting()}

    @torch.inference_mode()
    def _score_part(self, ends: EndsBySource, target_T: Tensor, begin: int, end: int) -> dict[str, Scores]:
        rows_W = (target_T[begin:end] != NO_TARGET).nonzero()[:, 0]
        wanted_W, scores, reference = target_T[begin:end][rows_W], {}, None
        for lane, lane_pass in self._lasting() if len(rows_W) else ():
            logits_WV = self._logits(lane_pass.hidden.read(begin, end)[rows_W], self._ends_of(lane, ends))
            scores[lane.name] = score(logits_WV, wanted_W, reference)
            reference = logits_WV if lane.name == REFERENCE else reference
        return scores

    def _logits(self, x_TD: Tensor, ends: Ends) -> Tensor:
        return KERNELS.linear(rms_norm(x_TD, ends.final_norm, self.config.rms_norm_eps), Projection(ends.lm_head))


def run_evaluation(
    plan: EvaluationPlan, on_layer: OnLayer = lambda done: None, keep: Callable[[Evaluation], None] = lambda found: None
) -> Evaluation:
    """Carry out ``plan``; what an interrupted run has done is continued, and removed once ``keep`` has what was found."""
    with OutputDir(plan.work_dir, kind="evaluation", fingerprint=plan.fingerprint) as out:
        job = EvaluationJob(plan, out, on_layer)
        try:
            evaluation = job.run()
        finally:
            job.close()
        keep(evaluation)
    plan.work_dir.rmdir()
    return evaluation


def _of_pass(lane_pass: LanePass, visit: Callable[[], Contribution]) -> tuple[LanePass, Contribution]:
    return lane_pass, visit()


def _parts(count: int, size: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + size, count)) for begin in range(0, count, size)]


def _error_sum(lane_pass: LanePass, reference: LanePass, begin: int, end: int) -> float:
    return float(relative_error(lane_pass.hidden.read(begin, end), reference.hidden.read(begin, end)).sum())

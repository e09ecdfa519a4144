"""The pass of a quantization, from the first layer that is not yet committed to the report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from arctic_trt import __version__
from arctic_trt.checkpoint.contract import plan_config
from arctic_trt.checkpoint.journal import Journal
from arctic_trt.checkpoint.output_dir import OutputDir, named_errors, sync_directory
from arctic_trt.checkpoint.writer import RankFiles
from arctic_trt.model.names import EMBEDDING, FINAL_NORM, LM_HEAD
from arctic_trt.quantize.calibrate import Calibration
from arctic_trt.quantize.data import plan_batches
from arctic_trt.quantize.device import take_device
from arctic_trt.quantize.layer_pass import LayerPass, LayerSummary
from arctic_trt.quantize.meter import Meter
from arctic_trt.quantize.plan import QuantizePlan
from arctic_trt.quantize.rows import FileRows, MemoryRows, Rows, load_rows, save_rows, sync_file
from arctic_trt.quantize.scales import GivenAmax, weight_amax
from arctic_trt.quantize.stream import WeightStream, WorkPool
from arctic_trt.quantize.team import Team

OnLayer = Callable[[LayerSummary, Meter], None]
logger = logging.getLogger(__name__)


def _ask_modelopt(plan: QuantizePlan, team: Team, device: str) -> GivenAmax:
    """Maxima of NVIDIA's whole-model calibration, found by process 0."""
    given = None
    if team.rank == 0:
        from arctic_trt.quantize import modelopt

        batches = plan_batches(plan.samples, plan.recipe.batch_size)
        given = modelopt.calibrate(plan.source, batches, plan.recipe.calib_algorithm, device)
    return team.broadcast(given)  # type: ignore[return-value]


class QuantizeJob:
    """The pass itself, from the first layer that is not yet committed."""

    def __init__(self, plan: QuantizePlan, out: OutputDir, team: Team, on_layer: OnLayer, *, resuming: bool) -> None:
        self.plan, self.out, self.team, self.on_layer = plan, out, team, on_layer
        self.config = plan.source.config
        self.journal = Journal(plan.recipe.output_dir)
        self.records = self.journal.records() if resuming else []
        if team.rank == 0:
            out.keep = bool(self.records)
            if resuming and not self.records:
                out.start_over()
            self.journal.open()
        self.files = self._open_files()
        self.meter = Meter(plan.source, self.files, plan.output_bytes, self.config.num_hidden_layers, len(self.records))
        self.pool = WorkPool(plan.workers)
        self._syncing = ThreadPoolExecutor(1, "sync")
        self._committing: tuple[LayerSummary, dict[str, Any], Future[None]] | None = None
        self._digests: list[dict[str, dict[str, str]]] = [record["digests"] for record in self.records]
        self.device = take_device(plan.recipe.device, team.rank)
        batches = plan_batches(plan.samples, plan.recipe.batch_size)
        streaming = bool(batches) and plan.recipe.calibrator == "streaming"
        self.calibration = Calibration(batches, self.config, self._new_rows, team, self.device) if streaming else None
        self.given = None if streaming or not batches else _ask_modelopt(plan, team, self.device)

    def run(self) -> dict[str, Any]:
        """All layers that are left, then what follows the last; returns the report."""
        summaries = [LayerSummary(**record["summary"]) for record in self.records]
        if summaries:
            logger.info("Resuming after layer %d of %d.", len(summaries), self.config.num_hidden_layers)
        self._begin()
        todo = range(len(summaries), self.config.num_hidden_layers)
        experts = self.team.share(self.config.num_local_experts)
        with WeightStream(self.plan.source, todo, experts, self.plan.memory.depth, self.device) as stream:
            layers = LayerPass(
                self.files, self.plan.quant, self.calibration, stream, self.pool, self.team, self.meter.at, self.given
            )
            for layer in todo:
                summaries.append(layers.run(layer))
                self._start_commit(summaries[-1])
                self.on_layer(summaries[-1], self.meter)
        self._finish_commit()
        self._free_rows()
        self._end()
        return self._report(summaries)

    def close(self) -> None:
        self._syncing.shutdown(wait=True)
        self.pool.close()
        self.files.close()
        self._free_rows()

    def _free_rows(self) -> None:
        """Give the hidden states' space back: what follows the last layer needs none of it."""
        if self.calibration:
            self.calibration.close()
        self.calibration = None

    def _open_files(self) -> RankFiles:
        """Process 0 creates the files; the others wait for it and open what it created."""
        output_dir = self.plan.recipe.output_dir
        first = self.team.rank == 0
        arguments = (output_dir, self.config, self.plan.mapping, self.plan.quant)
        files = RankFiles(*arguments, resume=bool(self.records)) if first else None
        if files:
            files.sync()  # headers and sizes, which the journal will take for granted
            with named_errors(output_dir):
                sync_directory(output_dir)
        self.team.barrier()
        return files or RankFiles(*arguments, resume=True)

    def _begin(self) -> None:
        """Hidden states: restored from the journal, or the embedding of the calibration tokens."""
        if self.records:
            self.files.assume_layers(len(self.records))
            if self.calibration:
                record = self.records[-1]
                state = self.journal.state(record["summary"]["layer"])
                load_rows(self.calibration.hidden, self.calibration.num_tokens, state, record["state"])
            return
        embedding_VD = self.plan.source.read(EMBEDDING.hf[0])
        weight_amax({EMBEDDING.hf[0]: embedding_VD})
        if self.team.rank == 0:
            self.files.write_global(EMBEDDING, embedding_VD, stage=0)
        if self.calibration:
            self.calibration.embed(embedding_VD)

    def _start_commit(self, summary: LayerSummary) -> None:
        """Begin to make a finished layer durable, while the next one runs: its bytes, and the state that follows it."""
        self._finish_commit()
        checksum = 0
        if self.calibration and self.team.rank == 0:
            state = self.journal.state(summary.layer)
            checksum = save_rows(self.calibration.hidden, self.calibration.num_tokens, state)
        record = {"state": checksum, "summary": summary.as_dict(), "digests": self._take_digests()}
        self._committing = (summary, record, self._syncing.submit(self._sync, summary.layer))

    def _sync(self, layer: int) -> None:
        self.files.sync(layer)
        if self.calibration and self.team.rank == 0:
            sync_file(self.journal.state(layer))

    def _finish_commit(self) -> None:
        """Wait until the layer's bytes are durable on every process, then record it."""
        if self._committing is None:
            return
        summary, record, synced = self._committing
        self._committing = None
        synced.result()
        self.team.barrier()
        if self.team.rank == 0:
            self.journal.commit(summary.layer, record)
            self.out.keep = True

    def _take_digests(self) -> dict[str, dict[str, str]]:
        """Digests of what all processes have written since the last time: the tensors of one layer, and those around it."""
        self._digests.append(self.files.tensor_crcs(self.team.gather(self.files.take_crcs())))
        return self._digests[-1]

    def digests(self) -> dict[str, dict[str, str]]:
        """Of each file, the CRC-32 of every tensor; after :meth:`run`, on all processes."""
        merged: dict[str, dict[str, str]] = {}
        for part in self._digests:
            for file, crcs in part.items():
                merged.setdefault(file, {}).update(crcs)
        return {file: dict(sorted(merged[file].items())) for file in sorted(merged)}

    def _end(self) -> None:
        for row in (FINAL_NORM, LM_HEAD):
            if self.team.rank == 0:
                tensor = self.plan.source.read(row.hf[0])
                weight_amax({row.hf[0]: tensor})
                self.files.write_global(row, tensor, stage=self.plan.mapping.pp_size - 1)
        self._take_digests()
        self.files.sync()
        written = self.team.gather(self.files.written())
        if self.team.rank == 0:
            self.files.finish(written)
            with named_errors(self.plan.recipe.output_dir):
                sync_directory(self.plan.recipe.output_dir)

    def _new_rows(self, tokens: int) -> Rows:
        if self.plan.memory.spill:
            return FileRows(tokens, self.config.hidden_size, self.journal.directory)
        return MemoryRows(tokens, self.config.hidden_size)

    def _report(self, summaries: list[LayerSummary]) -> dict[str, Any]:
        plan, fold = self.plan, self.plan.source.kv_fold
        totals = [sum(column) for column in zip(*self.team.gather(self.meter.totals()), strict=True)]
        return {
            "output_dir": str(plan.recipe.output_dir),
            "tensors": plan.num_tensors,
            "bytes_read": totals[0],
            "bytes_written": totals[1],
            "seconds": round(self.meter.seconds, 3),
            "peak_rss_bytes": max(self.team.gather(self.meter.peak_rss_bytes())),
            "resumed_layers": len(self.records),
            "experts_without_tokens": [[s.layer, expert] for s in summaries for expert in s.experts_without_tokens],
            "processes": self.team.size,
            "calibration_samples": len(plan.samples),
            "calibration_tokens": sum(map(len, plan.samples)),
            "hidden_states_on_disk": plan.memory.spill,
            "modules_in_bf16": [list(each) for each in plan.quant.modules_in_bf16(self.config.num_hidden_layers)],
            "kv_heads_folded_from": fold.heads_in_file if fold else None,
            "tokens_per_expert": [list(s.tokens_per_expert) for s in summaries],
            "scales": [s.scales for s in summaries],
            "expert_scales": [s.expert_scales for s in summaries],
            "config": plan_config(self.config, plan.mapping, plan.quant),
            "recipe": plan.recipe.model_dump(mode="json"),
            "fingerprint": plan.fingerprint,
            "version": __version__,
        }

"""Engine directories: those of the torch backend tensor by tensor, TensorRT's as far as anyone but TensorRT can see."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from arctic_trt.checkpoint.contract import rank_file
from arctic_trt.checkpoint.tensors import TensorFile, flat_bytes
from arctic_trt.checkpoint.trtllm import TrtCheckpoint
from arctic_trt.engine.config import EngineConfig
from arctic_trt.engine.tensorrt_llm.checks import read_engine_facts
from arctic_trt.engine.tensorrt_llm.versions import why_unsupported
from arctic_trt.engine.torch.build import repack
from arctic_trt.engine.torch.format import EngineTensor, plan_engine_tensors
from arctic_trt.errors import ArcticTrtError, UsageError
from arctic_trt.report.verify.findings import Verification
from arctic_trt.report.verify.headers import open_rank_file
from arctic_trt.report.verify.values import NAN, Work, chosen, problem_of

Files = dict[int, TensorFile]


def check_tensorrt_engine(path: Path, engine: EngineConfig, found: Verification) -> None:
    """Configuration, version, and every rank's file, by its recorded size where it is recorded."""
    _, mapping, _ = engine.network("config.json")
    try:
        facts = read_engine_facts(path, mapping.world_size)
    except ArcticTrtError as error:
        found.error("file", path.name, "", error.message)
        return
    found.count(mapping.world_size, 0)
    reason = why_unsupported(facts.version)
    if reason:
        found.error("version", "config.json", "", f"{reason.replace('is installed', 'built this engine')}.")
    if facts.tensorrt is None:
        found.warn("record", "build.json", "", "build.json is not there: sizes and versions of these engines are not recorded.")


def check_torch_engine(path: Path, engine: EngineConfig, found: Verification) -> Files:
    """Every rank file's header against the plan; returns the files that can be read."""
    config, mapping, quant = engine.network("config.json")
    files: Files = {}
    for rank in mapping.ranks():
        plan = (tensor.spec for tensor in plan_engine_tensors(config, rank, quant))
        file = open_rank_file(path / rank_file(rank.index), plan, found)
        if file:
            files[rank.index] = file
    return files


def torch_engine_works(
    files: Files, engine: EngineConfig, against: Path | None, found: Verification, share: float
) -> Iterator[Work]:
    """One work a tensor: its values, and with the checkpoint ``against`` its bytes."""
    config, mapping, quant = engine.network("config.json")
    checkpoint = TrtCheckpoint(against) if against else None
    if checkpoint and (checkpoint.config, checkpoint.mapping, checkpoint.quant) != (config, mapping, quant):
        raise UsageError(
            f"{against} is cut or quantized in another way than the engine.", "Give the checkpoint that it was built of."
        )
    for rank in mapping.ranks():
        for tensor in plan_engine_tensors(config, rank, quant):
            if rank.index in files and tensor.spec.name in files[rank.index].tensors and chosen(tensor.spec.name, share):
                source = checkpoint.file(rank.index) if checkpoint else None
                yield partial(_check_tensor, files[rank.index], tensor, source, found)


def _check_tensor(file: TensorFile, tensor: EngineTensor, source: TensorFile | None, found: Verification) -> None:
    name, values = tensor.spec.name, file.read(tensor.spec.name)
    problem = problem_of(values)
    if problem:
        found.error("not finite" if problem == NAN else "zero", file.path.name, name, f"{name} {problem}.")
    if source is not None:
        expected = _Collected()
        repack(tensor, source, expected)  # type: ignore[arg-type]  # it only writes
        if not torch.cat(expected.parts).equal(flat_bytes(values)):
            found.error("payload", file.path.name, name, f"{name} is not what the checkpoint gives.")
    found.count(1, values.nbytes)


class _Collected:
    """Takes the place of the file that an engine is written to."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def write(self, name: str, tensor: Tensor, part: int = 0) -> None:
        self.parts.append(flat_bytes(tensor))

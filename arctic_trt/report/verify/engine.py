"""Engine directories: those of the torch backend tensor by tensor, TensorRT's as far as anyone but TensorRT can see."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from arctic_trt.checkpoint.contract import rank_file
from arctic_trt.checkpoint.digests import Digests
from arctic_trt.checkpoint.tensors import TensorFile, bytes_of, flat_bytes
from arctic_trt.checkpoint.trtllm import TrtCheckpoint
from arctic_trt.engine.config import EngineConfig
from arctic_trt.engine.tensorrt_llm.checks import read_engine_facts
from arctic_trt.engine.tensorrt_llm.versions import why_unsupported
from arctic_trt.engine.torch.build import repack
from arctic_trt.engine.torch.format import EngineTensor, plan_engine_tensors
from arctic_trt.errors import ArcticTrtError, CheckpointError, UsageError
from arctic_trt.report.verify.findings import Verification
from arctic_trt.report.verify.headers import open_rank_file
from arctic_trt.report.verify.numbers import check_numbers
from arctic_trt.report.verify.records import check_crc
from arctic_trt.report.verify.values import PADDED, Work, chosen

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
    files: Files, engine: EngineConfig, against: Path | None, digests: Digests | None, found: Verification, share: float
) -> Iterator[Work]:
    """One work a tensor: its values, its digest, and with the checkpoint ``against`` its bytes."""
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
                yield partial(_check_tensor, files[rank.index], tensor, source, digests, found)


def _check_tensor(
    file: TensorFile, tensor: EngineTensor, source: TensorFile | None, digests: Digests | None, found: Verification
) -> None:
    name, shape = tensor.spec.name, tensor.spec.shape
    look = _Look(file, name, found)
    step = 1 if len(shape) == 3 else shape[0]
    try:
        if source is not None:
            repack(tensor, source, look)  # type: ignore[arg-type]  # it only writes
        else:
            for begin in range(0, shape[0], step):
                look.at(begin, step)
    except CheckpointError as error:
        found.error("payload", file.path.name, name, error.message)
        return
    if look.differs:
        found.error("payload", file.path.name, name, f"{name} is not what the checkpoint gives.")
    else:
        check_crc(digests, file.path.name, name, look.crc, found)
    found.count(1, tensor.spec.num_bytes)


class _Look:
    """Takes the place of the file that a tensor is written to: what would be written is held to what is there, part by part."""

    def __init__(self, file: TensorFile, name: str, found: Verification) -> None:
        self._file, self._name, self._found = file, name, found
        self.crc, self.differs = 0, False

    def write(self, name: str, part: Tensor, index: int = 0) -> None:
        """What belongs there as the ``index``-th of equal parts."""
        self.differs |= not flat_bytes(self.at(index * len(part), len(part))).equal(flat_bytes(part))

    def at(self, begin: int, rows: int) -> Tensor:
        """The next rows of the tensor, looked at by themselves."""
        values = self._file.read_rows(self._name, begin, begin + rows)
        self.crc = zlib.crc32(bytes_of(values), self.crc)
        check_numbers(values, self._file.path.name, self._name, self._found, may_be_zero=self._name in PADDED)
        return values

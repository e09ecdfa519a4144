"""Reading a finished TensorRT-LLM checkpoint, checked against its own ``config.json``."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from arctic_trt.checkpoint.contract import parse_pretrained_config, plan_rank, rank_file, read_json
from arctic_trt.checkpoint.layout import TensorSpec
from arctic_trt.checkpoint.mapped import MappedFile
from arctic_trt.checkpoint.tensors import TensorFile, describe
from arctic_trt.errors import CheckpointError


class TrtCheckpoint:
    """A finished TensorRT-LLM checkpoint, opened for reading and checked against its own ``config.json``."""

    def __init__(self, checkpoint_dir: Path) -> None:
        self.checkpoint_dir = checkpoint_dir
        self.raw_config = read_json(
            checkpoint_dir / "config.json", "Point --checkpoint_dir at the output of arctic-trt quantize."
        )
        self.config, self.mapping, self.quant = parse_pretrained_config(self.raw_config, str(checkpoint_dir / "config.json"))
        self._files: dict[int, TensorFile] = {}
        for rank in self.mapping.ranks():
            self._files[rank.index] = file = TensorFile(checkpoint_dir / rank_file(rank.index))
            check_specs(file, plan_rank(self.config, rank, self.quant))

    def names(self, rank: int) -> list[str]:
        return list(self._files[rank].tensors)

    def read(self, rank: int, name: str) -> Tensor:
        return self._files[rank].read(name)

    def file(self, rank: int) -> TensorFile:
        return self._files[rank]

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def check_specs(
    file: TensorFile | MappedFile, expected: list[TensorSpec], hint: str = "Was it made by another run? Quantize again."
) -> None:
    """Hold one rank file to its plan; raises :class:`CheckpointError` naming the first tensor that differs."""
    wanted = {spec.name: spec for spec in expected}
    for name in sorted(wanted.keys() ^ file.tensors.keys()):
        verb = "lacks" if name in wanted else "holds the unexpected"
        raise CheckpointError(f"{file.path} {verb} tensor {name}.", hint)
    for name, spec in wanted.items():
        found = file.tensors[name].spec
        if found != spec:
            raise CheckpointError(
                f"{name} in {file.path} is {found.dtype} {describe(found.shape)}, expected {spec.dtype} {describe(spec.shape)}.",
                hint,
            )

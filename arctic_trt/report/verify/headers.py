"""One rank file of a checkpoint or an engine, held to its plan by its header."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from arctic_trt.checkpoint.layout import TensorSpec
from arctic_trt.checkpoint.tensors import TensorFile, describe
from arctic_trt.errors import ArcticTrtError
from arctic_trt.report.verify.findings import Verification


def open_rank_file(path: Path, plan: Iterable[TensorSpec], found: Verification) -> TensorFile | None:
    """The file with those of its tensors that are as planned; None where it cannot be read. What differs is a finding."""
    try:
        file = TensorFile(path)
    except ArcticTrtError as error:
        found.error("file", path.name, "", error.message)
        return None
    wanted = {spec.name: spec for spec in plan}
    for tensor in sorted(wanted.keys() ^ file.tensors.keys()):
        verb, kind = ("lacks", "missing") if tensor in wanted else ("holds the unexpected", "extra")
        found.error(kind, path.name, tensor, f"{path.name} {verb} tensor {tensor}.")
    right = {}
    for tensor in wanted.keys() & file.tensors.keys():
        is_, spec = file.tensors[tensor].spec, wanted[tensor]
        if is_ == spec:
            right[tensor] = file.tensors[tensor]
            continue
        sentence = f"{tensor} is {is_.dtype} {describe(is_.shape)}, expected {spec.dtype} {describe(spec.shape)}."
        found.error("shape" if is_.dtype == spec.dtype else "dtype", path.name, tensor, sentence)
    file.tensors = {tensor: right[tensor] for tensor in file.tensors if tensor in right}
    return file

"""What a quantization has written down about its own result: its report, and the digests of what it wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from arctic_trt.checkpoint.digests import DIGESTS, Digests, crc_text, file_crc, read_digests
from arctic_trt.errors import CheckpointError
from arctic_trt.model.names import LAYER, Cut, weight_scale
from arctic_trt.quantize.pipeline import REPORT
from arctic_trt.report.verify.findings import Verification

EXPERT_WEIGHT_SCALES = tuple(weight_scale(row.trt) for row in LAYER if row.cut in (Cut.EXPERT_FC, Cut.EXPERT_PROJ))


class Report(BaseModel):
    """The part of :data:`REPORT` that a checkpoint is held to; None is what earlier versions did not record."""

    model_config = ConfigDict(frozen=True)

    scales: list[dict[str, float]]
    expert_scales: list[dict[str, list[float]]] | None = None
    config: dict[str, Any] | None = None
    recipe: dict[str, Any] = {}

    def scale(self, layer: int, suffix: str) -> list[float] | None:
        """What a scale of ``layer`` was: one number, or one for each expert; none where it is missing.

        None of the experts' own in a report of an earlier version, which did not record them.
        """
        single = self.scales[layer] if layer < len(self.scales) else {}
        if suffix in single or suffix not in EXPERT_WEIGHT_SCALES:
            return [single[suffix]] if suffix in single else []
        if self.expert_scales is None:
            return None
        experts = self.expert_scales[layer] if layer < len(self.expert_scales) else {}
        return experts.get(suffix.removesuffix(".weights_scaling_factor"), [])

    @property
    def scales_are_maxima(self) -> bool:
        """Whether weight scales are the largest weight over 448; ModelOpt's other algorithms choose them in other ways."""
        return self.recipe.get("calibrator") != "modelopt" or self.recipe.get("calib_algorithm", "max") == "max"


@dataclass(frozen=True, slots=True)
class Records:
    """What there is to hold a checkpoint to; None where it is not there or cannot be read, which is a finding."""

    report: Report | None
    digests: Digests | None


def read_records(path: Path, found: Verification) -> Records:
    """Both records of ``path``, and a finding for each that is missing or cannot be read."""
    return Records(_read_report(path, found), read_digests_of(path, found))


def _read_report(path: Path, found: Verification) -> Report | None:
    try:
        report = Report.model_validate(json.loads((path / REPORT).read_text(encoding="utf-8")))
    except FileNotFoundError:
        found.warn("report", REPORT, "", f"{REPORT} is not there: scales cannot be held to what was calibrated.")
        return None
    except (ValueError, OSError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        found.error("report", REPORT, "", f"{REPORT} cannot be read: {reason}.")
        return None
    missing = [name for name in ("expert_scales", "config") if getattr(report, name) is None]
    if missing:
        sentence = f"{REPORT} is of an earlier version and lacks {' and '.join(missing)}: these cannot be checked by themselves."
        found.warn("report", REPORT, "", sentence)
    return report


def check_crc(digests: Digests | None, file: str, tensor: str, crc: int, found: Verification) -> None:
    """Hold a tensor's CRC-32 to the record, if there is one."""
    if digests is None:
        return
    recorded = digests.tensors.get(file, {}).get(tensor, "nothing")
    if crc_text(crc) != recorded:
        sentence = f"{tensor} is not what was written: its CRC-32 is {crc_text(crc)}, {DIGESTS} says {recorded}."
        found.error("digest", file, tensor, sentence)


def read_digests_of(path: Path, found: Verification) -> Digests | None:
    """The digests of a checkpoint or an engine, whose side files are held to them."""
    try:
        digests = read_digests(path)
    except CheckpointError as error:
        found.error("digest", DIGESTS, "", error.message)
        return None
    if digests is None:
        found.warn("digest", DIGESTS, "", f"{DIGESTS} is not there: bytes cannot be held to what was written.")
        return None
    for name, recorded in digests.files.items():
        if not (path / name).is_file():
            found.error("file", name, "", f"{name} is missing; it was there when the directory was written.")
        elif file_crc(path / name) != recorded:
            sentence = f"{name} is not what was written: its CRC-32 is {file_crc(path / name)}, {DIGESTS} says {recorded}."
            found.error("digest", name, "", sentence)
    return digests

"""What is known about a checkpoint: the records in its ``report/``, checked, and what is wrong with those that cannot be read.

The records are written by ``quantize``, ``verify`` and ``eval``; keys that are not listed here are ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from arctic_trt.checkpoint.contract import QuantFormat, parse_pretrained_config
from arctic_trt.errors import ArcticTrtError
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import Mapping

REPORT_DIR = "report"
LayerIndex = Annotated[int, Field(ge=0, lt=1000)]
Count = Annotated[int, Field(ge=0)]
Site = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,64}$")]
AnyRecord = TypeVar("AnyRecord", bound="Record")


class Record(BaseModel):
    """Part of a JSON file that other commands wrote."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Quantization(Record):
    """``report/quantize.json``; ``tokens_per_expert`` is [layers][experts], with empty layers where nothing was calibrated."""

    seconds: float
    bytes_read: Count
    bytes_written: Count
    peak_rss_bytes: Count
    tensors: Count
    processes: Count = 1
    resumed_layers: Count = 0
    calibration_samples: Count
    calibration_tokens: Count
    experts_without_tokens: list[tuple[LayerIndex, Count]]
    tokens_per_expert: list[list[Count]]
    scales: list[dict[Site, float]]
    recipe: dict[str, Any]
    fingerprint: dict[str, Any]
    version: str

    @field_validator("tokens_per_expert")
    @classmethod
    def _is_a_table(cls, value: list[list[int]]) -> list[list[int]]:
        if len({len(layer) for layer in value}) > 1:
            raise ValueError("layers have different numbers of experts")
        return value

    @property
    def tokens(self) -> list[list[int]]:
        """[layers][experts], or empty without calibration."""
        return self.tokens_per_expert if self.tokens_per_expert and self.tokens_per_expert[0] else []


class Finding(Record):
    """One sentence of a verification."""

    severity: Literal["error", "warning"]
    kind: str
    file: str
    tensor: str
    sentence: str


class Quality(Record):
    """Signal to quantization noise of one matrix."""

    tensor: str
    sqnr_db: float


class SiteQuality(Record):
    """Signal to quantization noise of the ``count`` matrices of one site in one layer."""

    layer: LayerIndex
    site: Site
    min_db: float
    mean_db: float
    count: Count


class Verification(Record):
    """``report/verify.json``; ``share`` is that of the matrices that were looked at, 0 where only the structure was."""

    passed: bool
    errors: Count
    warnings: Count
    findings: list[Finding]
    worst: list[Quality] = []
    sqnr: list[SiteQuality] | None = None
    tensors: Count
    bytes_read: Count
    path: str
    against: str | None = None
    share: float = 1.0
    seconds: float


class Data(Record):
    """The text of an evaluation."""

    path: str
    samples: Count
    tokens: Count
    predicted_tokens: Count
    digest: str


class Reference(Record):
    """How well the model predicts that a checkpoint was made of."""

    perplexity: float
    nll: float


class SiteSensitivity(Record):
    """The distance from the reference when one kind of site alone is quantized."""

    site: Site
    kl_mean: float


class Unit(Record):
    """What could be left in bf16: its share of the distance, what it costs, and whether the recipe keeps it."""

    layer: LayerIndex | None
    site: Site
    error: float
    kl: float
    bytes: Count
    kept: bool


class Sensitivity(Record):
    """Which sites quantization hurts most."""

    sites: list[SiteSensitivity]
    units: list[Unit]
    budget_bytes: Count
    spent_bytes: Count
    predicted_kl: float
    recipe: str


class Evaluation(Record):
    """``report/eval.json``; what was not measured is None. KL is in nats a token, ``hidden_error`` relative, by layer."""

    path: str
    against: str | None
    data: Data
    perplexity: float
    nll: float
    reference: Reference | None
    kl_mean: float | None
    kl_p99: float | None
    kl_max: float | None
    top1_agreement: float | None
    hidden_error: list[float] | None
    seconds: float
    peak_rss_bytes: Count
    bytes_read: Count
    resumed_layers: Count
    version: str
    sensitivity: Sensitivity | None = None


@dataclass(frozen=True, slots=True)
class Network:
    """``config.json`` of the checkpoint."""

    config: ArcticConfig
    mapping: Mapping
    quant: QuantFormat


@dataclass(frozen=True, slots=True)
class Records:
    """Everything that is known; None for what was not measured, and for what cannot be read, which ``problems`` says."""

    name: str
    network: Network | None = None
    quantization: Quantization | None = None
    verification: Verification | None = None
    evaluation: Evaluation | None = None
    problems: tuple[str, ...] = ()


def read_records(checkpoint_dir: Path) -> Records:
    """Read whatever records there are; one that is broken is a problem to report, never an error."""
    problems: list[str] = []
    return Records(
        checkpoint_dir.resolve().name,
        _read_network(checkpoint_dir, problems),
        _read(checkpoint_dir, "quantize", Quantization, problems),
        _read(checkpoint_dir, "verify", Verification, problems),
        _read(checkpoint_dir, "eval", Evaluation, problems),
        tuple(problems),
    )


def _read(checkpoint_dir: Path, stem: str, kind: type[AnyRecord], problems: list[str]) -> AnyRecord | None:
    name = f"{REPORT_DIR}/{stem}.json"
    try:
        return kind.model_validate(json.loads((checkpoint_dir / name).read_bytes()))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        problems.append(f"{name} cannot be used: {where}: {first['msg']}.")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{name} cannot be read: {_reason(error)}.")
    return None


def _read_network(checkpoint_dir: Path, problems: list[str]) -> Network | None:
    try:
        raw = json.loads((checkpoint_dir / "config.json").read_bytes())
        return Network(*parse_pretrained_config(raw, "config.json"))
    except ArcticTrtError as error:
        problems.append(error.message)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        problems.append(f"config.json cannot be read: {_reason(error)}.")
    return None


def _reason(error: Exception) -> str:
    return error.strerror or "unknown error" if isinstance(error, OSError) else str(error)

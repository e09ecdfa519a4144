"""What a verification has found, one sentence each."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from arctic_trt.model.names import site_of

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be, or, as a warning, that deserves a look.

    ``kind`` is a word for programs, ``file`` a name within the directory, ``tensor`` empty where a whole file is meant.
    """

    severity: str
    kind: str
    file: str
    tensor: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Quality:
    """How well one matrix survived its cast: signal to quantization noise in dB, estimated from a part of it."""

    tensor: str
    sqnr_db: float


@dataclass(slots=True)
class Verification:
    """Everything found so far; threads may add to it. ``bytes_read`` counts both directories."""

    findings: list[Finding] = field(default_factory=list)
    qualities: list[Quality] = field(default_factory=list)
    tensors: int = 0
    bytes_read: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def error(self, kind: str, file: str, tensor: str, sentence: str) -> None:
        self.add(Finding(ERROR, kind, file, tensor, sentence))

    def warn(self, kind: str, file: str, tensor: str, sentence: str) -> None:
        self.add(Finding(WARNING, kind, file, tensor, sentence))

    def add(self, finding: Finding) -> None:
        with self._lock:
            self.findings.append(finding)

    def count(self, tensors: int, num_bytes: int, qualities: Iterable[Quality] = ()) -> None:
        """Work that is done."""
        with self._lock:
            self.tensors += tensors
            self.bytes_read += num_bytes
            self.qualities.extend(qualities)

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == ERROR]

    @property
    def passed(self) -> bool:
        return not self.errors

    def worst(self, count: int = 10) -> list[Quality]:
        """The matrices that lost most."""
        return sorted(self.qualities, key=lambda quality: (quality.sqnr_db, quality.tensor))[:count]

    def by_site(self) -> list[dict[str, Any]]:
        """The noise of every site in every layer: the worst of its ``count`` matrices and their mean, in dB."""
        sites: dict[tuple[int, str], list[float]] = {}
        for quality in self.qualities:
            sites.setdefault(site_of(quality.tensor), []).append(quality.sqnr_db)
        return [
            {"layer": layer, "site": site, "min_db": min(found), "mean_db": fmean(found), "count": len(found)}
            for (layer, site), found in sorted(sites.items())
        ]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``; findings are ordered, errors first."""
        ordered = sorted(self.findings, key=lambda finding: (finding.severity, finding.file, finding.tensor, finding.kind))
        return {
            "passed": self.passed,
            "errors": len(self.errors),
            "warnings": len(self.findings) - len(self.errors),
            "findings": [asdict(finding) for finding in ordered],
            "worst": [asdict(quality) for quality in self.worst()],
            "sqnr": self.by_site(),
            "tensors": self.tensors,
            "bytes_read": self.bytes_read,
        }

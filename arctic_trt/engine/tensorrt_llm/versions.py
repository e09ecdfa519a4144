"""Which TensorRT-LLM is installed, and what this package knows of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.machine import package_version

NEWEST = "1.2.1"
OLDEST, TOO_NEW = (1, 0), (1, 3)
NO_SUCCESSOR = "Leave it out: the checkpoint's mapping decides."
DROPPED = dict.fromkeys(("auto_parallel", "gpus_per_node", "cluster_key"), ((1, 2), NO_SUCCESSOR))
"""The first version without a flag, and what to do. All other flags are the same in 1.0, 1.1 and 1.2: nothing was added."""


@dataclass(frozen=True, slots=True)
class Versions:
    """Versions that an engine is tied to; ``assumed`` where TensorRT-LLM is not installed and only a dry run is possible."""

    tensorrt_llm: str
    tensorrt: str | None
    assumed: bool = False

    @property
    def release(self) -> tuple[int, int]:
        return release_of(self.tensorrt_llm)


def installed_versions() -> Versions | None:
    """What the package metadata says, without importing anything; None where there is no TensorRT-LLM."""
    version = package_version("tensorrt_llm")
    return Versions(version, package_version("tensorrt")) if version else None


def release_of(version: str) -> tuple[int, int]:
    """``(1, 2)`` of ``1.2.1`` or ``1.2.0rc3``; raises :class:`UsageError` for anything else."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise UsageError(f"tensorrt_llm {version!r} has a version that cannot be read.", f"Install tensorrt-llm=={NEWEST}.")
    return int(match[1]), int(match[2])


def why_unsupported(version: str) -> str | None:
    """Why engines cannot be built or run with this version of TensorRT-LLM; None if they can."""
    release = release_of(version)
    if release >= TOO_NEW:
        return f"tensorrt_llm {version} is installed, but engines were removed from TensorRT-LLM after 1.2"
    if release < OLDEST:
        return f"tensorrt_llm {version} is installed, expected 1.0 to 1.2"
    return None


def check_supported(version: str) -> None:
    """Raise :class:`RefusedError` for a version that cannot build engines, or whose flags are not known here."""
    reason = why_unsupported(version)
    if reason:
        raise RefusedError(f"{reason}.", f"Install tensorrt-llm=={NEWEST}, or use --backend torch.")


def check_flags(names: Iterable[str], versions: Versions) -> None:
    """Raise :class:`UsageError` for the first flag that this version does not have, saying what to do instead."""
    for name in names:
        release, advice = DROPPED.get(name, (TOO_NEW, ""))
        if versions.release >= release:
            raise UsageError(f"--{name} was removed in TensorRT-LLM {'.'.join(map(str, release))}. {advice}")

"""Which backend builds an engine."""

from __future__ import annotations

import logging

from arctic_trt.engine.config import BACKENDS, TENSORRT_LLM, TORCH
from arctic_trt.engine.tensorrt_llm.versions import NEWEST, check_supported, why_unsupported
from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.machine import package_version

AUTO = "auto"
HOW_TO_GET = (
    f"Install it on a CUDA machine (pip install tensorrt-llm=={NEWEST}, or NVIDIA's release image of that version), "
    "or use --backend torch, which needs neither."
)

logger = logging.getLogger(__name__)


def tensorrt_llm_version() -> str | None:
    """The version of the package that is installed; it is not imported, which would take a GPU driver and half a minute."""
    return package_version("tensorrt_llm")


def choose_backend(requested: str, *, dry_run: bool = False) -> str:
    """:func:`resolve_backend` for this machine; a dry run of TensorRT-LLM does not need it installed."""
    if dry_run and requested == TENSORRT_LLM:
        return TENSORRT_LLM
    return resolve_backend(requested, tensorrt_llm_version())


def resolve_backend(requested: str, version: str | None) -> str:
    """``torch`` or ``tensorrt_llm`` for ``auto``, ``torch`` or ``tensorrt_llm``; ``version`` is TensorRT-LLM's, None if absent.

    Raises :class:`RefusedError` where TensorRT-LLM is asked for and absent, or is one that cannot build engines.
    """
    if requested not in (AUTO, *BACKENDS):
        raise UsageError(f"--backend {requested} is unknown, expected one of {', '.join((AUTO, *BACKENDS))}.")
    if requested == AUTO and version is None:
        logger.info("TensorRT-LLM is not installed: using the torch backend.")
        return TORCH
    if requested == AUTO and version is not None and why_unsupported(version):
        logger.warning("%s: using the torch backend.", why_unsupported(version))
        return TORCH
    if requested == TORCH:
        return TORCH
    if version is None:
        raise RefusedError("--backend tensorrt_llm needs the package tensorrt_llm, which is not installed.", HOW_TO_GET)
    check_supported(version)
    return TENSORRT_LLM

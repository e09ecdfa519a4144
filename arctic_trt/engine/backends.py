"""Which backend builds an engine."""

from __future__ import annotations

import importlib.util
import logging

from arctic_trt.engine.config import BACKENDS, TENSORRT_LLM, TORCH
from arctic_trt.errors import RefusedError, UsageError

AUTO = "auto"
HOW_TO_GET = "Install it on a CUDA machine (pip install tensorrt-llm==1.2.1), or use --backend torch, which needs neither."

logger = logging.getLogger(__name__)


def tensorrt_llm_installed() -> bool:
    """Whether the package can be found; it is not imported, which would take a GPU driver and half a minute."""
    return importlib.util.find_spec("tensorrt_llm") is not None


def resolve_backend(requested: str, installed: bool) -> str:
    """``torch`` or ``tensorrt_llm`` for ``auto``, ``torch`` or ``tensorrt_llm``; ``installed`` is about TensorRT-LLM.

    Raises :class:`RefusedError` where TensorRT-LLM is asked for and absent.
    """
    if requested not in (AUTO, *BACKENDS):
        raise UsageError(f"--backend {requested} is unknown, expected one of {', '.join((AUTO, *BACKENDS))}.")
    if requested == AUTO and not installed:
        logger.info("TensorRT-LLM is not installed: using the torch backend.")
        return TORCH
    if requested == TENSORRT_LLM and not installed:
        raise RefusedError("--backend tensorrt_llm needs the package tensorrt_llm, which is not installed.", HOW_TO_GET)
    return TENSORRT_LLM if requested == AUTO else requested

"""Which kernels compute: the compiled ones wherever they can be had."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import torch

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.runtime.kernels import CpuKernels, Kernels
from arctic_trt.runtime.native.kernels import NativeKernels
from arctic_trt.runtime.native.library import NotCompiledError

VARIABLE = "ARCTIC_TRT_CPU_KERNELS"
AUTO, COMPILED, PORTABLE = CHOICES = ("auto", "compiled", "portable")

logger = logging.getLogger(__name__)


def choose_kernels(environ: Mapping[str, str] = os.environ) -> Kernels:
    """The compiled kernels, or the portable ones, with a warning, where nothing can be compiled.

    ``ARCTIC_TRT_CPU_KERNELS`` decides otherwise: ``portable`` takes those, ``compiled`` raises :class:`RefusedError` where there
    would have been a warning. Raises :class:`UsageError` for any other value.
    """
    choice = environ.get(VARIABLE, AUTO)
    if choice not in CHOICES:
        raise UsageError(f"{VARIABLE}={choice} is none of {', '.join(CHOICES)}.")
    if choice == PORTABLE:
        return CpuKernels()
    try:
        kernels = NativeKernels(torch.get_num_threads())
    except NotCompiledError as error:
        if choice == COMPILED:
            raise RefusedError(f"The CPU kernels cannot be compiled: {error}.", f"Unset {VARIABLE}, or install gcc.") from None
        logger.warning(
            "The CPU kernels cannot be compiled (%s): the portable ones are many times slower and hold FP8 weights in bf16.",
            error,
        )
        return CpuKernels()
    torch.set_num_threads(1)  # the library has threads of its own, and two sets of threads would fight for the cores
    return kernels

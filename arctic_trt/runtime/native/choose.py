"""Which kernels compute: the compiled ones wherever they can be had."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import torch

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.runtime.kernels import CpuKernels, Kernels
from arctic_trt.runtime.layer import ComposedLayer, Layer, LayerShape
from arctic_trt.runtime.native.kernels import NativeKernels
from arctic_trt.runtime.native.layer import NativeLayer
from arctic_trt.runtime.native.library import NotCompiledError
from arctic_trt.runtime.weights import LayerWeights

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


def make_layers(kernels: Kernels, weights: Sequence[LayerWeights], shape: LayerShape) -> list[Layer]:
    """A rank's layers, as whole calls where the kernels have such."""
    if isinstance(kernels, NativeKernels):
        return [NativeLayer(kernels.library, each, shape) for each in weights]
    return [ComposedLayer(kernels, each, shape) for each in weights]

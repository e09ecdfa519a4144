"""Which modules of an FP8 checkpoint stay in bf16: TensorRT-LLM's ``exclude_modules``, by its names and its rules.

A pattern is matched, with case, against the full name of a module; layers count from 0 in every pipeline stage, and all stages
share one list. A layer's experts are one module, ``mlp``; its router is float32 in any case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

from arctic_trt.errors import UsageError
from arctic_trt.model.mapping import Mapping
from arctic_trt.model.names import LAYER, MOE, QUANTIZED_MODULES, RESIDUAL_FC, TWINS, Kind, trt_layer

PARTS_OF_MOE = tuple(row.trt.removesuffix(".weight") for row in LAYER if row.kind is Kind.QUANTIZED and row.module == MOE)

Patterns = tuple[str, ...]
Selection = frozenset[tuple[int, str]]
"""(layer, module) each, of the modules that are quantized unless they are excluded."""


@lru_cache(maxsize=1 << 16)
def matches(patterns: Patterns, name: str) -> bool:
    """Whether any pattern matches the full name of a module."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_excluded(patterns: Patterns, local_layer: int, module: str) -> bool:
    """Whether a module of a layer, which counts from 0 in its stage, is matched by any pattern."""
    return matches(patterns, trt_layer(local_layer, module))


def select(patterns: Sequence[str], layers: int, modules: Sequence[str] = QUANTIZED_MODULES) -> Selection:
    """What ``patterns`` match among ``modules`` of the first ``layers`` layers."""
    given = tuple(patterns)
    return frozenset((layer, name) for layer in range(layers) for name in modules if is_excluded(given, layer, name))


def split_twins(selection: Selection) -> int | None:
    """The first layer whose residual MLP has one of ``fc`` and ``gate`` excluded without the other."""
    chosen = [{layer for layer, module in selection if module == twin} for twin in TWINS]
    return min(chosen[0] ^ chosen[1], default=None)


def single_layer_module(selection: Iterable[tuple[int, str]], layers: int) -> str | None:
    """A module that is excluded in some layers but not in all, which a pipeline's shared list cannot express."""
    counts = Counter(module for _, module in selection)
    return next((name for name, count in counts.items() if count < layers), None)


def unnamed_to_fusion(patterns: Sequence[str], layers: int) -> list[str]:
    """Excluded ``residual_mlp.fc`` that TensorRT-LLM's ``use_fused_mlp`` would take for FP8.

    That pass knows no patterns: it looks for the very name, or for one that begins like an entry which ends in ``*``.
    """
    names = [trt_layer(layer, module) for layer, module in sorted(select(patterns, layers)) if module == RESIDUAL_FC]
    starts = tuple(pattern[:-1] for pattern in patterns if pattern.endswith("*"))
    return [name for name in names if name not in patterns and not name.startswith(starts)]


def plan_exclusion(patterns: Sequence[str], num_layers: int, mapping: Mapping) -> Patterns:
    """What ``exclude_modules`` says beside TensorRT-LLM's defaults; raises :class:`UsageError` for what cannot be meant.

    These are ``patterns`` as they are, and the names of residual MLPs that :func:`unnamed_to_fusion` would miss.
    """
    for pattern in patterns:
        _check_pattern(pattern, num_layers)
    selection = select(patterns, num_layers)
    _check_whole_moe(patterns, selection, num_layers)
    layer = split_twins(selection)
    if layer is not None:
        raise UsageError(
            f"--exclude_modules keeps one of {trt_layer(layer, RESIDUAL_FC)} and gate in bf16 and quantizes the other, but they "
            "read the same input in one product.",
            "Exclude both or none.",
        )
    module = single_layer_module(sorted(selection), num_layers) if mapping.pp_size > 1 else None
    if module:
        pattern = next(pattern for pattern in patterns if any(name == module for _, name in select([pattern], num_layers)))
        raise UsageError(
            f"--exclude_modules {pattern!r} selects {module} in some layers only, but in {mapping.pp_size} pipeline stages "
            "TensorRT-LLM counts layers from 0 and would select these numbers in every stage.",
            "Select all layers (transformer.layers.*), or use --pp_size 1.",
        )
    return (*patterns, *unnamed_to_fusion(patterns, len(mapping.layers(0, num_layers))))


def _check_pattern(pattern: str, num_layers: int) -> None:
    if pattern == "*":  # TensorRT-LLM asks its list about the model as a whole too, by the empty name
        raise UsageError(
            "--exclude_modules '*' excludes the model itself, and TensorRT-LLM cannot load that.", "Use --qformat full_prec."
        )
    if not select([pattern], num_layers) and not select([pattern], num_layers, PARTS_OF_MOE):
        raise UsageError(
            f"--exclude_modules {pattern!r} matches no module that is quantized.",
            f"Those are transformer.layers.N.X, N from 0 to {num_layers - 1}, X one of {', '.join(QUANTIZED_MODULES)}.",
        )


def _check_whole_moe(patterns: Sequence[str], selection: Selection, num_layers: int) -> None:
    for pattern in patterns:
        for layer, part in sorted(select([pattern], num_layers, PARTS_OF_MOE)):
            if (layer, MOE) not in selection:
                raise UsageError(
                    f"--exclude_modules {pattern!r} matches {trt_layer(layer, part)}, but TensorRT-LLM quantizes a layer's "
                    "experts as a whole or not at all.",
                    f"Exclude {trt_layer(layer, MOE)}, or write a pattern that leaves them out.",
                )

"""What identifies a quantization: two jobs with the same fingerprint write the same bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from arctic_trt import __version__
from arctic_trt.checkpoint.header import digest_headers
from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.model.mapping import Mapping
from arctic_trt.recipes import QuantizeRecipe

OUTPUT_FIELDS = ("qformat", "calib_size", "calib_max_seq_length", "batch_size", "calibrator", "calib_algorithm", "device")


def fingerprint(
    recipe: QuantizeRecipe, source: HfCheckpoint, mapping: Mapping, samples: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """A flat dict of everything that the output depends on; headers, configuration and samples as digests.

    A shard counts by its name, size and header. Where it lies, how many processes share the work, and how much memory they may
    take change nothing and are left out.
    """
    return {
        "version": __version__,
        "checkpoint_headers": digest_headers(source.shard_paths),
        "config": digest(source.config.model_dump()),
        "calibration_ids": digest(list(map(list, samples))),
        "kv_cache_dtype": "fp8" if recipe.kv_fp8 else "none",
        "exclude_modules": list(recipe.exclude_modules),
        **{name: getattr(recipe, name) for name in OUTPUT_FIELDS},
        **{name: size for name, size in mapping.as_dict().items() if name != "world_size"},
    }


def digest(value: object) -> str:
    """SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

"""Numbers as the page and the model card say them."""

from __future__ import annotations

import math
import shlex
from pathlib import PurePath

from arctic_trt.report.page.records import Evaluation, Records, Verification

NOT_MEASURED = "not measured"


def number(value: float | None) -> str:
    """Four digits that count; what is no number is said in words."""
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return f"{value:.4f}" if 1 <= abs(value) < 1000 else f"{value:.4g}"


def share(value: float | None, digits: int = 2) -> str:
    """A share as a percentage."""
    return NOT_MEASURED if value is None else f"{100 * value:.{digits}f} %"


def change(value: float, reference: float) -> str:
    """How much larger ``value`` is than ``reference``, as a percentage with its sign."""
    ratio = value / reference - 1 if reference else math.nan
    return f"{100 * ratio:+.2f} %" if math.isfinite(ratio) else "no comparison"


def depth(found: Verification) -> str:
    """What a verification has looked at."""
    if found.share == 0:
        return "structure only: files, headers, configuration, scales"
    part = "every matrix" if found.share >= 1 else f"a sample of {share(found.share, 0)} of the matrices"
    return (
        f"structure and {part}, byte by byte against {name_of(found.against)}"
        if found.against
        else f"structure and {part}, by itself"
    )


def verdict(found: Verification | None) -> str:
    """One word or two."""
    if found is None:
        return "not verified"
    return "passed" if found.passed else f"failed, {plural(found.errors, 'error')}"


def plural(count: int, word: str) -> str:
    """A count of things."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def worst_db(found: Verification | None) -> float | None:
    """Signal to noise of the matrix that lost most, if the original was there to compare with."""
    if found is None:
        return None
    return min([quality.min_db for quality in found.sqnr or ()] + [quality.sqnr_db for quality in found.worst], default=None)


def agreement(found: Evaluation | None) -> list[tuple[str, str]]:
    """How far the checkpoint is from what it was made of, by name."""
    values = (found.kl_mean, found.kl_p99, found.kl_max) if found else (None, None, None)
    names = ("KL divergence, mean", "KL divergence, 99th percentile", "KL divergence, largest")
    rows = [(name, NOT_MEASURED if value is None else f"{number(value)} nats") for name, value in zip(names, values, strict=True)]
    return [*rows, ("same likeliest token", share(found.top1_agreement if found else None))]


def original(records: Records) -> str:
    """The directory of the model that the checkpoint was made of, or a word in its place."""
    return str(records.quantization.recipe.get("model_dir", "MODEL_DIR")) if records.quantization else "MODEL_DIR"


def measuring(checkpoint: str, against: str, command: str, *flags: str) -> str:
    """The command line that measures what is missing."""
    return shlex.join(["arctic-trt", command, checkpoint, "--against", against, *flags])


def title_of(records: Records) -> str:
    """What the checkpoint is, in a few words."""
    if records.network is None:
        return "Checkpoint"
    quant = records.network.quant
    kind = "FP8" if quant.fp8 else "bf16"
    base = base_of(records) if records.quantization else "an Arctic model"
    return f"{kind} checkpoint of {base}" + (" with an FP8 KV cache" if quant.kv_fp8 else "")


def base_of(records: Records) -> str:
    """The name of the model that the checkpoint was made of."""
    return name_of(original(records)) if records.quantization else "MODEL_DIR"


def name_of(path: str) -> str:
    """The last part of a path, which says what it is and not where on which machine."""
    return PurePath(path).name or path

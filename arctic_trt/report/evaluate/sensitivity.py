"""Which sites cost most, and which of them to keep in bf16 when the checkpoint may grow by so much.

KL divergences this small add up: the noise of different sites is independent, and KL is quadratic in it. Each kind of site is
measured alone over the whole model, which gives its KL; that is spread over the layers by the squared error which each of them
adds to the reference's hidden states. docs/verification.md says how well both hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arctic_trt.checkpoint.trtllm import TrtCheckpoint
from arctic_trt.errors import UsageError
from arctic_trt.model.names import trt_layer
from arctic_trt.quantize.memory import parse_size
from arctic_trt.report.evaluate.lanes import ATTENTION, EXPERTS, KV_CACHE, RESIDUAL_MLP, SITES, probe_of

MODULES = {
    ATTENTION: ("attention.qkv", "attention.dense"),
    RESIDUAL_MLP: ("residual_mlp.fc", "residual_mlp.gate", "residual_mlp.proj"),
    EXPERTS: ("mlp",),
}
"""TensorRT-LLM's modules of a site, as ``exclude_modules`` names them; it takes a layer's experts as one."""
CALIBRATION = ("calib_dataset", "calib_size", "calib_max_seq_length", "batch_size")
GRID = 4096


@dataclass(frozen=True, slots=True)
class Unit:
    """Something that can be kept in bf16: a site of one layer, or, with ``layer`` None, the KV cache of all.

    ``error`` is the mean relative error that it adds to the hidden states (of all layers, their root mean square), ``kl`` its
    share of the KL divergence in nats, ``bytes`` what the checkpoint grows by. The KV cache is no part of a checkpoint: 0.
    """

    layer: int | None
    site: str
    error: float
    kl: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """The units in the order of their cost, those that are kept, and the KL that the others are expected to leave."""

    units: list[Unit]
    kept: list[Unit]
    budget_bytes: int
    predicted_kl: float

    @property
    def spent_bytes(self) -> int:
        return sum(unit.bytes for unit in self.kept)

    def as_dict(self) -> dict[str, Any]:
        """For the report; every unit says whether it is kept."""
        return {
            "units": [{**asdict(unit), "kept": unit in self.kept} for unit in self.units],
            "budget_bytes": self.budget_bytes,
            "spent_bytes": self.spent_bytes,
            "predicted_kl": self.predicted_kl,
        }


def find_units(
    site_kl: Mapping[str, float], errors: Sequence[Mapping[str, float]], grows: Mapping[tuple[int, str], int]
) -> list[Unit]:
    """Every unit, the costliest first.

    ``site_kl`` is the KL of each kind of site alone, ``errors`` the layers' relative errors by lane, ``grows`` what a
    (layer, site) would grow by; sites that are not in it are not quantized.
    """
    units = []
    for site in SITES:
        squares = [layer[probe_of(site)] ** 2 for layer in errors]
        total = sum(squares)
        if site == KV_CACHE:
            units.append(Unit(None, site, (total / len(squares)) ** 0.5, site_kl[site], 0))
            continue
        for layer, square in enumerate(squares):
            if (layer, site) in grows:
                share = square / total if total else 0.0
                units.append(Unit(layer, site, square**0.5, site_kl[site] * share, grows[layer, site]))
    return sorted(units, key=lambda unit: -unit.kl)


def choose_units(units: list[Unit], eligible: list[Unit], budget_bytes: int, total_kl: float) -> Choice:
    """Of ``eligible``, those whose KL is largest together among what fits ``budget_bytes``: a knapsack, its sizes on a grid."""
    step = max(1, -(-budget_bytes // GRID))
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (budget_bytes // step + 1)
    for index, unit in enumerate(eligible):
        size = -(-unit.bytes // step)
        for room in range(len(best) - 1, size - 1, -1):
            gain, chosen = best[room - size]
            if gain + unit.kl > best[room][0]:
                best[room] = (gain + unit.kl, (*chosen, index))
    kept = [eligible[index] for index in best[-1][1]]
    explained = sum(unit.kl for unit in units)
    left = 1 - sum(unit.kl for unit in kept) / explained if explained else 1.0
    return Choice(units, kept, budget_bytes, total_kl * max(0.0, left))


def extra_bytes(checkpoint: TrtCheckpoint) -> dict[tuple[int, str], int]:
    """What the files grow by when a (layer, site) is stored in bf16, over all ranks; only what is quantized now."""
    grows: dict[tuple[int, str], int] = {}
    for layer in range(checkpoint.config.num_hidden_layers):
        for site, modules in MODULES.items():
            stored = [
                item.spec
                for rank in checkpoint.mapping.ranks()
                for name, item in checkpoint.file(rank.index).tensors.items()
                if name.startswith(tuple(trt_layer(layer, f"{module}.") for module in modules))
            ]
            codes = sum(spec.num_bytes for spec in stored if spec.dtype == "F8_E4M3")
            scales = sum(spec.num_bytes for spec in stored if "scaling_factor" in spec.name)
            if codes:
                grows[layer, site] = codes - scales
    return grows


def parse_budget(text: str, checkpoint_bytes: int) -> int:
    """Bytes of ``10%`` of a checkpoint, or of a size like ``40GB``; raises :class:`UsageError`."""
    if not text.strip().endswith("%"):
        return parse_size(text, flag="--size_budget")
    try:
        share = float(text.strip()[:-1]) / 100
    except ValueError:
        share = -1.0
    if not 0 < share < float("inf"):
        raise UsageError(f"--size_budget {text!r} is not a share.", "Write it as 10%, or as a size like 40GB.")
    return int(share * checkpoint_bytes)


def plan_recipe(choice: Choice, checkpoint: TrtCheckpoint, model_dir: Path, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of ``quantize`` that keeps what was chosen; calibration as ``recorded`` in the checkpoint's report."""
    sizes = {name: size for name, size in checkpoint.mapping.as_dict().items() if name != "world_size"}
    calibration = {key: recorded[key] for key in CALIBRATION if key in recorded}
    keeps_cache = any(unit.site == KV_CACHE for unit in choice.kept)
    excluded = {name for unit in choice.kept for name in names_of(unit)}
    already = recorded.get("exclude_modules") or []
    return {
        "model_dir": str(model_dir),
        "qformat": "fp8",
        "kv_cache_dtype": "none" if keeps_cache or not checkpoint.quant.kv_fp8 else "fp8",
        **sizes,
        **calibration,
        "exclude_modules": [*already, *sorted(excluded - set(already))],
    }


def names_of(unit: Unit) -> list[str]:
    """TensorRT-LLM's names of a unit's modules; none for the KV cache."""
    if unit.layer is None:
        return []
    return [trt_layer(unit.layer, module) for module in MODULES[unit.site]]

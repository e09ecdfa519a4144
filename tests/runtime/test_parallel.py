"""The same tokens and the same logits however an engine is cut over ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.runtime.conftest import Model
from tests.support.engines import complete, mpirun
from tests.support.fp8_emulation import error_of, fp8_logits
from tests.support.naive_forward import naive_logits

pytestmark = pytest.mark.mpi

MAX_OUTPUT_LEN = 12
MAX_ERROR, MEAN_ERROR = 2e-2, 3e-3  # what the interface promises
SAME, MEAN_SAME = 5e-3, 5e-5
"""Between cuts of one checkpoint: sums of other parts differ in their last bit, so that now and then an activation rounds to the
neighbouring code."""
MIXED = ("transformer.layers.0.mlp", "*.residual_mlp.*", "transformer.layers.1.attention.dense")
CUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-tp8": ("tiny", {"tp_size": 8}),
    "tiny-tp4": ("tiny", {"tp_size": 4}),
    "tiny-tp4ep2": ("tiny", {"tp_size": 4, "moe_ep_size": 2}),
    "tiny-tp4ep4": ("tiny", {"tp_size": 4, "moe_ep_size": 4}),
    "tiny-tp2pp2": ("tiny", {"tp_size": 2, "pp_size": 2}),
    "tiny-tp2": ("tiny", {"tp_size": 2}),
    "tiny-pp2": ("tiny", {"tp_size": 1, "pp_size": 2}),
    "narrow-tp8ep4": ("narrow", {"tp_size": 8, "moe_ep_size": 4}),
    "narrow-tp2pp3": ("narrow", {"tp_size": 2, "pp_size": 3}),
    "unlike-tp4": ("unlike", {"tp_size": 4}),
    "unlike-tp2pp2": ("unlike", {"tp_size": 2, "pp_size": 2}),
    "unlike-bf16-tp4": ("unlike", {"tp_size": 4, "qformat": "full_prec"}),
    "tiny-mixed-tp2ep2": ("tiny", {"tp_size": 2, "moe_ep_size": 2, "exclude_modules": MIXED}),
}
ROUNDS = [
    ["tiny-tp8"],
    ["tiny-tp4", "tiny-tp4ep2"],
    ["tiny-tp4ep4", "tiny-tp2pp2"],
    ["tiny-tp2", "tiny-pp2", "unlike-tp4"],
    ["unlike-tp2pp2", "unlike-bf16-tp4"],
    ["narrow-tp8ep4"],
    ["narrow-tp2pp3", "tiny-mixed-tp2ep2"],
]


@dataclass(frozen=True)
class Worlds:
    """What the MPI job found, and what one rank finds in this process."""

    work_dir: Path
    models: dict[str, Model]
    prompts: dict[str, list[list[int]]]

    def found(self, name: str) -> tuple[list[list[int]], Tensor]:
        with np.load(self.work_dir / f"{name}.npz") as arrays:
            return arrays["tokens"].tolist(), torch.from_numpy(arrays["logits"])


@pytest.fixture(scope="module")
def worlds(tiny: Model, unlike: Model, narrow: Model, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    work_dir = tmp_path_factory.mktemp("worlds")
    models = {"tiny": tiny, "unlike": unlike, "narrow": narrow}
    prompts = {name: model.prompts(17, 3, 1, 40) for name, model in models.items()}
    engines = {name: models[model].engine(name, **recipe) for name, (model, recipe) in CUTS.items()}

    def world(name: str) -> list[Any]:
        sizes = CUTS[name][1]
        return [CUTS[name][0], str(engines[name]), sizes["tp_size"] * sizes.get("pp_size", 1), name]

    rounds = [[world(name) for name in names] for names in ROUNDS]
    plan = {"prompts": prompts, "max_output_len": MAX_OUTPUT_LEN, "rounds": rounds}
    (work_dir / "plan.json").write_text(json.dumps(plan))
    job = mpirun(8, "-m", "mpi4py", "-m", "tests.support.parallel_worlds", work_dir, timeout_s=100)
    assert job.code == 0, job.err
    return Worlds(work_dir, models, prompts)


@pytest.mark.parametrize("name", CUTS)
def test_tokens_and_logits_do_not_depend_on_the_cut(name: str, worlds: Worlds, tmp_path: Path) -> None:
    model, recipe = worlds.models[CUTS[name][0]], CUTS[name][1]
    prompts = worlds.prompts[CUTS[name][0]]
    formats = {key: recipe[key] for key in ("qformat", "exclude_modules") if key in recipe}
    alone = model.engine({"qformat": "bf16", "exclude_modules": "mixed"}[next(iter(formats))] if formats else "fp8", **formats)
    result, logits = complete(alone, prompts, tmp_path, max_output_len=MAX_OUTPUT_LEN, end_id=-1)
    tokens, found = worlds.found(name)
    assert tokens == [output.token_ids for output in result.outputs]
    largest, mean = error_of(found, logits)
    assert largest <= SAME and mean <= MEAN_SAME


@pytest.mark.parametrize("name", CUTS)
def test_logits_equal_a_float32_reference(name: str, worlds: Worlds) -> None:
    model, recipe = worlds.models[CUTS[name][0]], CUTS[name][1]
    _, found = worlds.found(name)
    for index, prompt in enumerate(worlds.prompts[CUTS[name][0]]):
        if "qformat" in recipe:
            expected = naive_logits(model.config, load_file(model.hf_dir / "model.safetensors"), prompt)
        else:
            expected = fp8_logits(model.checkpoint(name, **recipe), prompt)
        largest, mean = error_of(found[index, : len(prompt)], expected)
        assert largest <= MAX_ERROR and mean <= MEAN_ERROR
        assert not found[index, len(prompt) :].any()


@pytest.mark.parametrize("name", ["tiny-tp2", "tiny-pp2"])
def test_sharing_and_losing_blocks_changes_nothing(name: str, worlds: Worlds) -> None:
    tokens, _ = worlds.found(name)
    with np.load(worlds.work_dir / f"{name}.npz") as arrays:
        assert arrays["crowded"].tolist() == tokens * 2
        assert arrays["preemptions"] > 0 and arrays["reused_tokens"] > 0


def test_collectives(worlds: Worlds) -> None:
    found = json.loads((worlds.work_dir / "collectives.json").read_text())
    for size, in_rank_order, first_group, second_group in found["sums"]:
        assert (in_rank_order, first_group, second_group) == (True, 1, 1), f"{size} floats"
    rows = [
        [[10.0 * (rank // 4 * 4 + column // 3) + 3 * row + column % 3 for column in range(12)] for row in range(2)]
        for rank in range(8)
    ]
    assert found["gathered"] == rows
    assert found["broadcasts"] == [True] * 5
    assert found["received"] == [None] * 4 + [True] * 4
    assert found["failures"] == [["rank 3: file 3 is broken. Mend it.", 1]] * 8

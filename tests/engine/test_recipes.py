"""The recipes for machines that come along: valid, truthful about memory, and ready to build with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.recipes import BuildRecipe, resolve
from arctic_trt.report.gpus import MACHINES
from tests.conftest import Finished
from tests.support.checkpoints import TINY, random_checkpoint, random_ids, write_samples
from tests.support.jobs import quantize

ROOT = Path(__file__).parents[2]
ENGINES = sorted((ROOT / "engines").glob("*.yaml"))
FOR_MACHINES = [path for path in ENGINES if path.stem != "cpu-tiny"]
TRTLLM = [path for path in FOR_MACHINES if not path.stem.endswith("-torch")]
ARCTIC = ROOT / "tests" / "data" / "arctic-config" / "config.json"
NOWHERE = {"checkpoint_dir": Path("checkpoint"), "output_dir": Path("engine")}
SUM = re.compile(r"weights ([\d.]+) GB \+ KV cache ([\d.]+) GB \+ activations ([\d.]+) GB = ([\d.]+) GB")

each = pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
each_for_a_machine = pytest.mark.parametrize("path", FOR_MACHINES, ids=lambda path: path.stem)
each_of_trtllm = pytest.mark.parametrize("path", TRTLLM, ids=lambda path: path.stem)


def read(path: Path) -> BuildRecipe:
    return resolve(BuildRecipe, NOWHERE, path)


def comment(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))


@lru_cache
def planned(path: Path) -> dict[str, Any]:
    from click.testing import CliRunner

    from arctic_trt.cli.main import cli

    done = CliRunner().invoke(cli, ["plan", str(ARCTIC), "--no_measure", "--engine_config", str(path), "--json", "-q"])
    assert done.exit_code == 0
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_the_machines_that_are_asked_for_are_there() -> None:
    assert {path.stem for path in ENGINES} == {
        *("cpu-tiny", "h100x8-fp8", "h100x8-fp8-latency", "h100x8-fp8-throughput", "h100x8-fp8-ootb", "h100x16-bf16"),
        *("h200x8-fp8", "h200x8-fp8-throughput", "h200x4-fp8", "h100x8-torch", "h200x8-torch"),
    }


@each
def test_a_recipe_is_valid_and_says_what_it_is_for(path: Path) -> None:
    recipe = read(path)
    assert (recipe.max_seq_len or 0) <= 4096
    assert path.read_text().startswith("# ") and len(comment(path)) > 60


@each_for_a_machine
def test_a_recipe_knows_its_machine(path: Path) -> None:
    expects = read(path).expects
    assert expects is not None and expects.machine in {f"{machine.count} x {machine.name}" for machine in MACHINES}
    assert expects.tp_size * expects.pp_size == int(expects.machine.split()[0])
    assert expects.machine in comment(path).splitlines()[0]
    assert "has not been run on such a machine yet" in comment(path)


@each_for_a_machine
def test_the_memory_arithmetic_is_that_of_plan(path: Path) -> None:
    plan, expects = planned(path), read(path).expects
    assert expects is not None
    written = [tuple(map(float, found)) for found in SUM.findall(comment(path))]
    keys = ("weights_bytes", "kv_cache_bytes", "activation_bytes", "needed_bytes_per_gpu")
    assert written == [tuple(round(stage[key] / 1e9, 2) for key in keys) for stage in plan["stages"]]
    [machine] = [gpu for gpu in plan["gpus"] if f"{gpu['count']} x {gpu['name']}" == expects.machine]
    assert machine["fits"] and f"of {machine['gpu_memory_bytes'] / 1e9:.2f} GB" in comment(path)
    assert machine["mapping"]["tp_size"] == expects.tp_size and plan["mapping"]["pp_size"] == expects.pp_size


def test_the_figures_agree_with_the_known_sizes() -> None:
    by_name = {path.stem: planned(path) for path in TRTLLM}
    assert by_name["h100x8-fp8"]["rank_bytes"] == [60_006_437_660] * 8
    assert by_name["h100x8-fp8"]["stages"][0]["kv_bytes_per_token"] == 8960
    assert sum(by_name["h100x16-bf16"]["rank_bytes"]) > 957e9


@each_of_trtllm
def test_a_dry_run_shows_the_commands(
    path: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, arctic_trt: Callable[..., Finished]
) -> None:
    expects = read(path).expects
    assert expects is not None
    checkpoint = checkpoint_for(tmp_path_factory, expects.tp_size, expects.pp_size, expects.qformat)
    words = ["--checkpoint_dir", checkpoint, "--output_dir", tmp_path / "engine"]
    done = arctic_trt("build", "--config", path, *words, "--dry_run", "--json")
    assert done.code == 0, done.err
    value = json.loads(done.out)
    line = " ".join(value["command"])
    assert len(value["rank_commands"]) == value["world_size"] == expects.tp_size * expects.pp_size
    for name in ("max_batch_size", "max_num_tokens", "moe_plugin", "gemm_plugin", "use_fp8_context_fmha"):
        assert f"--{name} {getattr(read(path), name)}" in line
    assert list(tmp_path.iterdir()) == []
    assert ("OOTB" in done.err) == ("ootb" in path.stem)


_made: dict[tuple[int, int, str], Path] = {}


def checkpoint_for(factory: pytest.TempPathFactory, tp_size: int, pp_size: int, qformat: str) -> Path:
    """A checkpoint with the number of ranks and the number format that a recipe expects."""
    key = tp_size, pp_size, qformat
    if key not in _made:
        directory = factory.mktemp("recipe")
        model = random_checkpoint(directory / "model", TINY)
        samples = write_samples(directory / "samples.jsonl", random_ids(TINY["vocab_size"], [8]))
        quantize(model, directory / "out", calib_dataset=str(samples), tp_size=tp_size, pp_size=pp_size, qformat=qformat)
        _made[key] = directory / "out"
    return _made[key]


@pytest.mark.parametrize(
    ("recipe", "tp_size", "qformat", "complaint"),
    [
        ("h200x4-fp8", 8, "fp8", "has tp_size 8, but this recipe for 4 x H200 141GB expects 4. Quantize with --tp_size 4"),
        ("h100x8-fp8", 8, "full_prec", "has qformat full_prec, but this recipe for 8 x H100 80GB expects fp8"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(
    recipe: str,
    tp_size: int,
    qformat: str,
    complaint: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    arctic_trt: Callable[..., Finished],
) -> None:
    checkpoint = checkpoint_for(tmp_path_factory, tp_size, 1, qformat)
    words = ["--checkpoint_dir", checkpoint, "--output_dir", tmp_path / "engine", "--dry_run"]
    done = arctic_trt("build", "--config", ROOT / "engines" / f"{recipe}.yaml", *words)
    assert done.code == 2 and complaint in done.err


@pytest.mark.parametrize("recipe", ["cpu-tiny", "h100x8-torch", "h200x8-torch"])
def test_the_recipes_of_the_portable_engine_build_here(
    recipe: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, arctic_trt: Callable[..., Finished]
) -> None:
    checkpoint = checkpoint_for(tmp_path_factory, 8, 1, "fp8")
    words = ["--checkpoint_dir", checkpoint, "--output_dir", tmp_path / "engine"]
    done = arctic_trt("build", "--config", ROOT / "engines" / f"{recipe}.yaml", *words, "--json")
    assert done.code == 0 and json.loads(done.out)["backend"] == "torch"
    assert "without effect" not in done.err


def test_plan_takes_limits_and_sizes_from_a_recipe_and_flags_over_it(arctic_trt: Callable[..., Finished]) -> None:
    recipe = ROOT / "engines" / "h200x4-fp8.yaml"
    found = json.loads(arctic_trt("plan", ARCTIC, "--no_measure", "--engine_config", recipe, "--json").out)
    assert found["mapping"]["tp_size"] == 4
    over = json.loads(arctic_trt("plan", ARCTIC, "--no_measure", "--engine_config", recipe, "--max_batch_size", 1, "--json").out)
    assert over["stages"][0]["kv_cache_bytes"] * 128 == found["stages"][0]["kv_cache_bytes"]

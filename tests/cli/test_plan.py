"""``arctic-trt plan`` as people and programs meet it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.cli.main import run_cli
from tests.report.hollow import ARCTIC, ARCTIC_DIR, SMALL, hollow_checkpoint

ROOT = Path(__file__).parents[2]
PROMISED = {"checkpoint_bytes", "output_bytes", "rank_bytes", "peak_memory_bytes", "disk_bytes", "seconds", "gpus"}


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


Plan = Callable[..., Ran]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Run ``arctic-trt plan WORDS... --no_measure`` in this process, as on a machine of two cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)

    def run(*words: object, measure: bool = False) -> Ran:
        capsys.readouterr()
        code = run_cli(["plan", *map(str, words), *([] if measure else ["--no_measure"])])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def free_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def set_free(num_bytes: int) -> None:
        usage = shutil._ntuple_diskusage(10**15, 0, num_bytes)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    return set_free


def test_tables_for_a_person(plan: Plan, free_disk: Callable[[int], None]) -> None:
    free_disk(10**12)
    done = plan(ARCTIC_DIR, "--memory_budget", "8GiB")
    assert (done.code, done.err) == (0, "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    for expected in (
        "model 35 layers, 128 experts, 8 KV heads",
        "checkpoint 957.17 GB in 13828 tensors, by config.json",
        "output 480.05 GB in 7304 tensors, FP8",
        "rank files 8 of 60.01 GB (tp 8, pp 1, moe_ep 1)",
        "disk 481.93 GB (1.00 TB are free)",
        "time not measured",
        "1 of 1 35 60.01 GB 293.60 MB (8960 B a token) 2.62 GB 62.92 GB",
        "8 x H100 80GB tp 8, pp 1 62.92 GB 85.52 GB yes",
        "4 x H200 141GB tp 4, pp 1 123.37 GB 150.75 GB yes",
        "8 x A100 80GB tp 8, pp 1 62.92 GB 85.90 GB no: no FP8 tensor cores",
    ):
        assert expected in lines


def test_quiet_still_answers(plan: Plan) -> None:
    done = plan(ARCTIC_DIR, "-q")
    assert done.code == 0 and done.err == "" and "957.17 GB" in done.out


@pytest.mark.parametrize("path", [ARCTIC_DIR, ARCTIC_DIR / "config.json"], ids=["directory", "file"])
def test_one_json_object(path: Path, plan: Plan) -> None:
    figures = plan(path, "--json").json
    assert set(figures) >= PROMISED
    assert figures["checkpoint_bytes"] == 957_169_217_536
    assert figures["output_bytes"] == sum(figures["rank_bytes"]) and len(figures["rank_bytes"]) == 8
    assert figures["seconds"] is None and figures["peak_memory_bytes"] < 8 << 30
    fits = {(gpu["name"].split()[0], gpu["count"]): gpu["fits"] for gpu in figures["gpus"]}
    assert fits["H100", 8] and fits["H200", 4] and not fits["H100", 4] and not fits["A100", 8]


def test_bf16_needs_other_machines(plan: Plan) -> None:
    figures = plan(ARCTIC_DIR, "--json", "--qformat", "full_prec").json
    fits = {(gpu["name"].split()[0], gpu["count"]): gpu["fits"] for gpu in figures["gpus"]}
    assert not fits["H100", 8] and fits["H100", 16] and fits["A100", 16] and fits["H200", 8] and not fits["H200", 4]
    assert figures["stages"][0]["kv_bytes_per_token"] == 143_360 // 8


def test_exclusions_by_flag_and_by_recipe(plan: Plan, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("exclude_modules: [transformer.layers.3.mlp]\n")
    by_flag, by_recipe = (
        plan(ARCTIC_DIR, *words, "--json").json
        for words in (["--exclude_modules", "transformer.layers.3.mlp"], ["--config", recipe])
    )
    assert by_flag["output_bytes"] == by_recipe["output_bytes"] and by_flag["modules_in_bf16"] == [[3, "mlp"]]
    assert by_flag["output_bytes"] - plan(ARCTIC_DIR, "--json").json["output_bytes"] > 128 * 3 * 7168 * 4864 - 10**5
    assert "tensors, FP8, modules in bf16: 1" in " ".join(plan(ARCTIC_DIR, "--config", recipe).out.split())
    done = plan(ARCTIC_DIR, "--config", recipe, "--pp_size", 2, "--tp_size", 4)
    assert done.code == 2 and "in 2 pipeline stages" in done.err and done.out == ""


def test_every_flag_counts(plan: Plan) -> None:
    words = (
        "--tp_size 4 --pp_size 2 --moe_ep_size 4 --kv_cache_dtype none --calib_size 16 --calib_max_seq_length 9999 --batch_size 2"
    )
    run_time = "--max_batch_size 3 --max_seq_len 100 --max_num_tokens 1000"
    figures = plan(ARCTIC_DIR, "--json", *words.split(), *run_time.split()).json
    assert figures["mapping"] == {"world_size": 8, "tp_size": 4, "pp_size": 2, "moe_tp_size": 1, "moe_ep_size": 4}
    assert figures["calibration_tokens"] == 16 * 4096  # samples are cut at the model's positions
    assert [stage["layers"] for stage in figures["stages"]] == [18, 17]
    assert figures["stages"][0]["kv_cache_bytes"] == 3 * 128 * 2 * 18 * 2 * 128 * 2
    assert (
        plan(ARCTIC_DIR, "--json", *words.split()).json["stages"][0]["activation_bytes"]
        > figures["stages"][0]["activation_bytes"]
    )


def test_hyphens_are_underscores(plan: Plan) -> None:
    hyphens = plan(ARCTIC_DIR, "--json", "--tp-size", "4", "--calib-max-seq-length", "64", "--qformat", "full-prec").json
    underscores = plan(ARCTIC_DIR, "--json", "--tp_size", "4", "--calib_max_seq_length", "64", "--qformat", "full_prec").json
    for changing in ("disk_free_bytes", "memory_budget_bytes", "refusals"):
        del hyphens[changing], underscores[changing]
    assert hyphens == underscores


class TestRefusals:
    def test_a_memory_budget_that_cannot_do(self, plan: Plan) -> None:
        done = plan(ARCTIC_DIR, "--memory_budget", "1GiB")
        assert done.code == 3 and "957.17 GB" in done.out
        assert done.err.splitlines()[-1].startswith("arctic-trt: error: The quantization needs 1.")
        assert "may take only 1.00 GiB. Raise --memory_budget to " in done.err
        advised = done.err.split("--memory_budget to ")[1].split(",")[0]
        assert plan(ARCTIC_DIR, "--memory_budget", advised).code == 0

    def test_a_disk_that_cannot_hold_it(self, plan: Plan, free_disk: Callable[[int], None], tmp_path: Path) -> None:
        free_disk(100 * 10**9)
        done = plan(ARCTIC_DIR, "--output_dir", tmp_path / "not" / "yet" / "there", "--memory_budget", "8GiB")
        assert done.code == 3 and done.err.count("\n") == 1
        assert (
            "needs 481.93 GB, but its disk has 100.00 GB free. Free 381.93 GB more, or choose another --output_dir." in done.err
        )
        assert not list(tmp_path.iterdir())

    def test_programs_get_the_figures_too(self, plan: Plan, free_disk: Callable[[int], None], tmp_path: Path) -> None:
        free_disk(1)
        done = plan(ARCTIC_DIR, "--output_dir", tmp_path, "--memory_budget", "1GiB", "--json", measure=True)
        assert done.code == 3 and done.json["checkpoint_bytes"] == 957_169_217_536
        assert done.json["seconds"] is None, "what cannot run is not timed"
        assert len(done.json["refusals"]) == 2 and "warning: The quantization needs" in done.err

    def test_a_machine_that_was_not_asked_about_is_only_a_warning(self, plan: Plan, free_disk: Callable[[int], None]) -> None:
        free_disk(1)
        done = plan(ARCTIC_DIR, "--json")
        assert done.code == 0 and "warning: . needs 481.93 GB" in done.err and done.json["refusals"]

    def test_gpus_are_no_refusal(self, plan: Plan) -> None:
        done = plan(ARCTIC_DIR, "--max_batch_size", "100000", "--json")
        assert done.code == 0 and not any(gpu["fits"] for gpu in done.json["gpus"])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "Missing argument"),
        (["nowhere"], "nowhere does not exist. Give the directory of a Hugging Face Arctic checkpoint, or its config.json."),
        ([ROOT / "arctic_trt"], "config.json does not exist"),
        ([ARCTIC_DIR, "--tp_size", "3"], "--tp_size 3 does not divide"),
        ([ARCTIC_DIR, "--max_seq_len", "5000"], "--max_seq_len 5000 exceeds max_position_embeddings=4096"),
        ([ARCTIC_DIR, "--memory_budget", "much"], "--memory_budget 'much' is not a size"),
        ([ARCTIC_DIR, "--seconds", "61"], "--seconds 61.0 is not valid"),
        ([ARCTIC_DIR, "--calib_size", "0"], "--calib_size 0 is not valid"),
        ([ARCTIC_DIR, "--overwrite"], "No such option"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_wrong_usage_is_exit_code_2(words: list[object], complaint: str, plan: Plan) -> None:
    done = plan(*words)
    assert (done.code, done.out) == (2, "") and complaint in done.err


class TestConfig:
    def test_a_recipe_gives_what_flags_do_not(self, plan: Plan, tmp_path: Path) -> None:
        recipe = tmp_path / "plan.yaml"
        recipe.write_text("tp_size: 4\nqformat: full_prec\nno_measure: true\n")
        figures = plan(ARCTIC_DIR, "--config", recipe, "--qformat", "fp8", "--json", measure=True).json
        assert len(figures["rank_bytes"]) == 4 and figures["calibration_tokens"] == 65536 and figures["seconds"] is None

    def test_a_recipe_of_quantize_can_be_planned(self, plan: Plan, tmp_path: Path) -> None:
        recipe = tmp_path / "fp8.yaml"
        keys = ("qformat: fp8", "kv_cache_dtype: fp8", "calib_dataset: cnn_dailymail", "calib_size: 2", "calib_max_seq_length: 8")
        recipe.write_text("\n".join(keys))
        assert plan(ARCTIC_DIR, "--config", recipe, "--json").json["calibration_tokens"] == 16

    def test_an_unknown_key_is_refused(self, plan: Plan, tmp_path: Path) -> None:
        recipe = tmp_path / "plan.yaml"
        recipe.write_text("tp_sise: 4\n")
        done = plan(ARCTIC_DIR, "--config", recipe)
        assert done.code == 2 and "has the unknown key 'tp_sise'. Did you mean 'tp_size'?" in done.err


class TestWeights:
    def test_headers_are_used(self, plan: Plan, tmp_path: Path) -> None:
        hollow_checkpoint(tmp_path / "model")
        done = plan(tmp_path / "model")
        assert done.code == 0 and "by the files' headers" in done.out

    def test_missing_shards_are_mentioned(self, plan: Plan, tmp_path: Path) -> None:
        hollow_checkpoint(tmp_path / "model")[0].unlink()
        done = plan(tmp_path / "model", "--json")
        assert done.code == 0 and done.json["checkpoint_on_disk"] is False
        assert "follow from config.json alone" in done.err and "does not exist" in done.err


class TestMeasuring:
    def test_time_and_rates(self, plan: Plan, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(SMALL))
        done = plan(tmp_path, "--tp_size", "2", "--output_dir", tmp_path / "out", "--seconds", "0.3", "--json", measure=True)
        figures = done.json
        alone = figures["seconds_alone"]
        assert figures["seconds"] == max(alone["read"] + alone["write"], alone["cast"] + alone["calibrate"]) > 0
        assert min(figures["rates"].values()) > 0
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]

    def test_time_for_a_person(self, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from arctic_trt.report import measure

        rates = measure.Rates(write_bytes=1e9, read_bytes=2e9, cast_bytes=3e9, gemm_flops=1e12, cores=2)
        monkeypatch.setattr(measure, "measure_machine", lambda directory, seconds: rates)
        done = plan(ARCTIC_DIR, measure=True)
        lines = [" ".join(line.split()) for line in done.out.splitlines()]
        assert "time 42 min 42 s" in lines
        assert "cores cast 5 min 19 s + calibrate 37 min 23 s, meanwhile" in lines
        assert "disk read 7 min 59 s + write 8 min 00 s" in lines
        assert "cast 3.00 GB/s, bf16 GEMM 1000 GFLOP/s on 2 cores" in lines
        assert "for 10.0 s" in done.err

    def test_an_interrupt_leaves_nothing(self, tmp_path: Path) -> None:
        words = ["plan", str(ARCTIC_DIR), "--qformat", "full_prec", "--seconds", "30"]
        process = subprocess.Popen(
            [sys.executable, "-m", "arctic_trt", *words],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr and "measuring" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "Interrupted" in err
        assert not list(tmp_path.iterdir())


def test_a_configuration_alone_needs_no_torch() -> None:
    script = (
        "import sys; from arctic_trt.cli.main import run_cli; code = run_cli(sys.argv[1:]);"
        "print('torch' in sys.modules, 'numpy' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    words = ["plan", str(ARCTIC_DIR), "--no_measure", "--json", "-q"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(done.stdout)["checkpoint_bytes"] == 957_169_217_536
    assert done.stderr.splitlines()[-1] == "False False"


def test_help_tells_what_is_estimated(plan: Plan) -> None:
    done = plan("--help")
    assert done.code == 0 and "Sizes on disk are exact" in done.out and "MODEL_DIR_OR_CONFIG" in done.out


def test_the_fixture_has_the_keys_of_the_released_file() -> None:
    assert {"auto_map", "moe_token_dropping", "enable_expert_tensor_parallelism", "router_aux_loss_coef"} <= set(ARCTIC)

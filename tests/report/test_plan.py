"""The forecast: sizes as the published figures have them, and what follows from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.checkpoint.contract import QuantFormat
from arctic_trt.errors import UsageError
from arctic_trt.model.config import ArcticConfig, parse_config
from arctic_trt.model.mapping import Mapping, plan_mapping
from arctic_trt.quantize.memory import parse_size
from arctic_trt.report.gpus import (
    MACHINES,
    USABLE_SHARE,
    Load,
    Machine,
    StageNeed,
    estimate_stages,
    judge_machine,
    machine_mapping,
)
from arctic_trt.report.measure import Rates
from arctic_trt.report.plan import (
    Forecast,
    Job,
    disk_refusal,
    estimate_time,
    flops_per_token,
    forecast,
    memory_refusal,
    read_source,
    source_from_config,
)
from tests.report.hollow import ARCTIC, ARCTIC_DIR, BASE, SMALL, SMALL_BYTES, hollow_checkpoint

FP8 = QuantFormat(fp8=True, kv_fp8=True)
BF16 = QuantFormat(fp8=False, kv_fp8=False)
LOAD = Load(max_batch_size=8, max_seq_len=4096, max_num_tokens=8192)
RATES = Rates(write_bytes=1e9, read_bytes=2e9, cast_bytes=3e9, gemm_flops=1e12, cores=2)
GIB = 1 << 30


def arctic(raw: dict[str, Any] = ARCTIC) -> ArcticConfig:
    return parse_config(raw)


def job(mapping: Mapping | None = None, quant: QuantFormat = FP8, **changes: Any) -> Job:
    defaults = {"samples": 128, "sample_tokens": 512, "batch_size": 1, "workers": 2, "budget_bytes": 8 * GIB}
    return Job(mapping=mapping or plan_mapping(arctic(), tp_size=8), quant=quant, **{**defaults, **changes})


def plan(raw: dict[str, Any] = ARCTIC, quant: QuantFormat = FP8, sizes: dict[str, int] | None = None, **changes: Any) -> Forecast:
    mapping = plan_mapping(arctic(raw), **(sizes or {"tp_size": 8}))
    return forecast(source_from_config(arctic(raw)), job(mapping, quant, **changes), LOAD)


def within_a_thousandth(published: float) -> Any:
    return pytest.approx(published, rel=1e-3)


class TestSizes:
    def test_the_fixture_is_the_released_configuration(self) -> None:
        assert len(ARCTIC) == 35 and (ARCTIC["bos_token_id"], ARCTIC["eos_token_id"]) == (31998, 31999)

    @pytest.mark.parametrize(("raw", "num_bytes"), [(ARCTIC, 957_169_217_536), (BASE, 963_334_844_416)], ids=["instruct", "base"])
    def test_the_checkpoint(self, raw: dict[str, Any], num_bytes: int) -> None:
        source = source_from_config(arctic(raw))
        assert (source.checkpoint_bytes, source.num_tensors, source.from_headers) == (num_bytes, 13_828, False)

    def test_one_rank_of_eight(self) -> None:
        """60.0 GB with 1,711,189,048 B a layer, of which 4 B are a reciprocal KV scale that need not be stored."""
        forecasted = plan()
        outside_layers = 2 * (2 * 4000 * 7168 + 7168)
        assert forecasted.rank_bytes == (forecasted.rank_bytes[0],) * 8
        assert forecasted.rank_bytes[0] == within_a_thousandth(60.0e9)
        assert forecasted.stages[0].weights_bytes == 35 * (1_711_189_048 - 4) + outside_layers
        assert 0 < forecasted.rank_bytes[0] - forecasted.stages[0].weights_bytes < 1e6  # the header
        assert forecasted.output_bytes == sum(forecasted.rank_bytes) == within_a_thousandth(480e9)
        assert forecasted.num_tensors == 8 * (35 * 26 + 3)

    def test_one_copy_of_everything_in_fp8(self) -> None:
        """479.4 GB are published for all linear layers in FP8: routers stored once, 4 bytes of scale a row."""
        assert plan(sizes={"tp_size": 1}).output_bytes == within_a_thousandth(479.4e9)

    def test_an_uneven_pipeline(self) -> None:
        """61.5 GB and 58.1 GB are published for the layers; the first stage has the embedding, the last norm and head."""
        forecasted = plan(sizes={"tp_size": 4, "pp_size": 2})
        rows = 2 * 8000 * 7168
        assert [stage.layers for stage in forecasted.stages] == [18, 17]
        assert forecasted.stages[0].weights_bytes - rows == within_a_thousandth(61.5e9)
        assert forecasted.stages[1].weights_bytes - rows - 2 * 7168 == within_a_thousandth(58.1e9)
        weights = [stage.weights_bytes for stage in forecasted.stages for _ in range(4)]
        assert forecasted.rank_bytes == tuple(pytest.approx(num_bytes, rel=1e-4) for num_bytes in weights)

    def test_expert_parallelism_moves_bytes_but_does_not_change_their_number(self) -> None:
        by_rows = plan().rank_bytes[0]
        by_experts = plan(sizes={"tp_size": 8, "moe_ep_size": 8}).rank_bytes[0]
        assert by_experts == pytest.approx(by_rows, rel=1e-5)

    def test_bf16_is_the_checkpoint_with_wider_routers(self) -> None:
        weights = plan(quant=BF16, sizes={"tp_size": 1}).stages[0].weights_bytes
        assert weights == 957_169_217_536 + 2 * 35 * 128 * 7168

    def test_the_vocabulary_is_padded_and_counted_so(self) -> None:
        raw = {**SMALL, "num_key_value_heads": 8}
        one, eight = (estimate_stages(arctic(raw), plan_mapping(arctic(raw), tp_size=n), BF16, LOAD)[0] for n in (1, 8))
        rows = 2 * 2 * 64 * 4 + 2 * 3 * (3 * 64) * 7 + 2 * 64 * 7 + 4 * 3 * 4 * 64 * 7  # padding; norms and routers 7 times more
        assert 8 * eight.weights_bytes == one.weights_bytes + rows


class TestGpus:
    def stage(self, raw: dict[str, Any] = ARCTIC, quant: QuantFormat = FP8, load: Load = LOAD, **sizes: int) -> StageNeed:
        return estimate_stages(arctic(raw), plan_mapping(arctic(raw), **sizes), quant, load)[0]

    @pytest.mark.parametrize(
        ("raw", "quant", "tp_size", "each"),
        [
            (ARCTIC, FP8, 8, 8_960),
            (ARCTIC, FP8, 4, 17_920),
            (ARCTIC, BF16, 8, 143_360 // 8),
            (ARCTIC, BF16, 1, 143_360),
            (ARCTIC, QuantFormat(fp8=True, kv_fp8=False), 1, 143_360),
            (BASE, BF16, 1, 1_003_520),
            (BASE, BF16, 8, 1_003_520 // 8),
            (SMALL, BF16, 8, 2 * 3 * 1 * 8 * 2),  # 4 heads on 8 ranks: every rank holds one
        ],
    )
    def test_kv_cache_of_a_token(self, raw: dict[str, Any], quant: QuantFormat, tp_size: int, each: int) -> None:
        assert self.stage(raw, quant, tp_size=tp_size).kv_bytes_per_token == each

    def test_a_stage_caches_its_own_layers(self) -> None:
        stages = estimate_stages(arctic(), plan_mapping(arctic(), tp_size=8, pp_size=2), FP8, LOAD)
        assert [stage.kv_bytes_per_token for stage in stages] == [18 * 256, 17 * 256]

    @pytest.mark.parametrize(("seq_len", "cached"), [(4096, 4096), (4095, 4096), (1, 32), (33, 64)])
    def test_sequences_take_whole_blocks(self, seq_len: int, cached: int) -> None:
        load = replace(LOAD, max_batch_size=3, max_seq_len=seq_len)
        assert self.stage(load=load, tp_size=8).kv_cache_bytes == 3 * cached * 8_960

    def test_what_a_rank_needs_is_the_sum(self) -> None:
        stage = self.stage(tp_size=8)
        assert stage.needed_bytes == stage.weights_bytes + stage.kv_cache_bytes + stage.activation_bytes
        assert stage.as_dict()["needed_bytes_per_gpu"] == stage.needed_bytes

    def test_activations_grow_with_the_step_and_shrink_with_ranks(self) -> None:
        one = self.stage(tp_size=1).activation_bytes
        eight = self.stage(tp_size=8).activation_bytes
        doubled = self.stage(load=replace(LOAD, max_num_tokens=16384), tp_size=8).activation_bytes
        logits = 4 * 8 * 32000
        assert eight < one and doubled - logits == 2 * (eight - logits)
        assert 2e9 < eight < 3e9

    @pytest.mark.parametrize(
        ("quant", "fitting"),
        [
            (FP8, {"8 H100", "16 H100", "4 H200", "8 H200", "4 B200", "8 B200"}),
            (BF16, {"16 A100", "16 H100", "8 H200", "8 B200"}),
        ],
        ids=["fp8", "bf16"],
    )
    def test_the_machines_that_fit(self, quant: QuantFormat, fitting: set[str]) -> None:
        fits = plan(quant=quant).machines
        assert {f"{fit.machine.count} {fit.machine.name.split()[0]}" for fit in fits if not fit.why_not} == fitting
        for fit in fits:
            assert fit.as_dict()["fits"] is (fit.why_not == "")
            assert fit.mapping and fit.mapping.world_size == fit.machine.count

    def test_why_not(self) -> None:
        reasons = {(fit.machine.name, fit.machine.count): fit.why_not for fit in plan().machines}
        assert reasons["A100 80GB", 8] == reasons["A100 80GB", 16] == "no FP8 tensor cores"
        assert reasons["H100 80GB", 4] == "not enough memory"

    def test_four_h200_hold_120_gb_each(self) -> None:
        fit = next(fit for fit in plan().machines if (fit.machine.name, fit.machine.count) == ("H200 141GB", 4))
        assert fit.needed_bytes and 119.8e9 + 8 * 4096 * 17_920 < fit.needed_bytes < 125e9

    def test_a_large_batch_no_longer_fits(self) -> None:
        h100 = Machine("H100 80GB", 8, 81559 << 20)
        judged = [judge_machine(h100, arctic(), job().mapping, FP8, replace(LOAD, max_batch_size=n)) for n in (256, 512)]
        assert [fit.why_not for fit in judged] == ["", "not enough memory"]

    def test_the_usable_share_is_the_limit(self) -> None:
        needed = self.stage(tp_size=8).needed_bytes
        for memory, why_not in ((needed / USABLE_SHARE + 1, ""), (needed / USABLE_SHARE - 1, "not enough memory")):
            assert judge_machine(Machine("X", 8, int(memory)), arctic(), job().mapping, FP8, LOAD).why_not == why_not

    def test_sixteen_gpus_are_two_nodes(self) -> None:
        mapping = machine_mapping(Machine("X", 16, 1), arctic(), job().mapping)
        assert mapping == plan_mapping(arctic(), tp_size=8, pp_size=2)

    def test_the_mapping_that_was_asked_for_is_kept_where_it_fits(self) -> None:
        asked = plan_mapping(arctic(), tp_size=4, pp_size=2, moe_ep_size=4)
        assert machine_mapping(Machine("X", 8, 1), arctic(), asked) is asked
        assert machine_mapping(Machine("X", 4, 1), arctic(), asked) == plan_mapping(arctic(), tp_size=4)

    def test_a_model_with_few_heads_goes_over_stages_or_not_at_all(self) -> None:
        asked = plan_mapping(arctic(SMALL))
        three_heads = arctic({**SMALL, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2})
        assert machine_mapping(Machine("X", 4, 1), three_heads, asked) == plan_mapping(three_heads, tp_size=2, pp_size=2)
        assert machine_mapping(Machine("X", 16, 1), three_heads, asked) is None
        fit = judge_machine(Machine("X", 16, 1), three_heads, asked, BF16, LOAD)
        assert fit.as_dict()["fits"] is False and fit.as_dict()["needed_bytes_per_gpu"] is None

    def test_every_machine_is_listed_once(self) -> None:
        assert len({(machine.name, machine.count) for machine in MACHINES}) == len(MACHINES)


class TestExclusions:
    """One layer's experts are 13.4 GB in FP8, and twice that in bf16."""

    EXPERTS = 128 * 3 * 7168 * 4864

    def test_sizes_grow_by_what_stays_in_bf16(self) -> None:
        excluded = plan(quant=replace(FP8, exclude_modules=("transformer.layers.3.mlp",)))
        scales = 8 * 4 * 2 * (1 + 128)
        assert abs(excluded.output_bytes - plan().output_bytes - (self.EXPERTS - scales)) <= 8 * 4096, "headers are padded"
        assert excluded.as_dict()["modules_in_bf16"] == [[3, "mlp"]] and plan().modules_in_bf16 == []
        grown = [after.weights_bytes - before.weights_bytes for before, after in zip(plan().stages, excluded.stages, strict=True)]
        assert grown == [(self.EXPERTS - scales) // 8]

    def test_everything_excluded_is_bf16(self) -> None:
        excluded = plan(quant=QuantFormat(fp8=True, kv_fp8=False, exclude_modules=("transformer.layers.*",)))
        assert excluded.rank_bytes == plan(quant=BF16).rank_bytes

    @pytest.mark.parametrize(("pattern", "why_not"), [("*.3.mlp", "exclude_modules names single layers"), ("*.mlp", "")])
    def test_single_layers_do_not_go_with_stages(self, pattern: str, why_not: str) -> None:
        quant, machine = replace(FP8, exclude_modules=(pattern,)), Machine("X", 16, 400 * GIB)
        assert judge_machine(machine, arctic(), job().mapping, quant, LOAD).why_not == why_not
        assert judge_machine(replace(machine, count=8), arctic(), job().mapping, quant, LOAD).why_not == ""


class TestMemoryAndDisk:
    def test_the_whole_model_takes_less_than_8_gib(self) -> None:
        forecasted = plan()
        assert forecasted.memory.peak_bytes < 8 * GIB and memory_refusal(forecasted) is None

    def test_the_disk_holds_output_and_journal(self) -> None:
        """65,536 hidden states of 14 kB, after the last layer committed and after the one being committed."""
        forecasted = plan()
        assert not forecasted.memory.spill
        assert forecasted.disk_bytes == forecasted.output_bytes + 2 * 128 * 512 * 7168 * 2

    def test_what_does_not_fit_in_memory_goes_to_disk(self) -> None:
        forecasted = plan(samples=2048)
        assert forecasted.memory.spill and forecasted.memory.peak_bytes < 8 * GIB
        assert forecasted.disk_bytes == forecasted.output_bytes + (2 + 3) * 2048 * 512 * 7168 * 2

    def test_without_fp8_there_is_no_calibration(self) -> None:
        forecasted = plan(quant=BF16)
        assert forecasted.job.tokens == 0 and forecasted.disk_bytes == forecasted.output_bytes

    @pytest.mark.parametrize("quant", [FP8, BF16], ids=["fp8", "bf16"])
    def test_a_budget_that_is_too_small_is_refused_with_one_that_is_not(self, quant: QuantFormat) -> None:
        refusal = memory_refusal(plan(quant=quant, budget_bytes=GIB))
        assert refusal and refusal.exit_code == 3 and "may take only 1.00 GiB" in refusal.message
        advised = refusal.hint.split()[3].rstrip(",")
        assert memory_refusal(plan(quant=quant, budget_bytes=parse_size(advised))) is None

    def test_a_disk_that_is_too_small_is_refused_with_what_is_missing(self) -> None:
        forecasted = plan()
        assert disk_refusal(forecasted, Path("out"), forecasted.disk_bytes) is None
        refusal = disk_refusal(forecasted, Path("out"), forecasted.disk_bytes - 3_000_000_000)
        assert refusal and refusal.exit_code == 3
        assert refusal.message == "out needs 481.93 GB, but its disk has 478.93 GB free." and "Free 3.00 GB more" in refusal.hint


class TestTime:
    def test_disk_and_cores_work_at_the_same_time(self) -> None:
        forecasted = plan()
        time = estimate_time(forecasted, RATES)
        assert time.read == pytest.approx(957.169e9 / 2e9, rel=1e-4)
        assert time.write == pytest.approx(forecasted.output_bytes / 1e9)
        assert time.cast == pytest.approx(957.169e9 / 3e9, rel=1e-4)
        assert time.calibrate == pytest.approx(65536 * flops_per_token(arctic(), 512) / 1e12)
        assert time.total == time.cast + time.calibrate > time.read + time.write
        faster = estimate_time(forecasted, replace(RATES, gemm_flops=1e15))
        assert faster.total == time.read + time.write

    def test_bf16_only_copies(self) -> None:
        time = estimate_time(plan(quant=BF16), RATES)
        assert (time.cast, time.calibrate) == (0, 0) and time.total == time.read + time.write

    def test_a_token_takes_two_operations_a_parameter_that_it_meets(self) -> None:
        """17.09e9 active parameters are published, the output head among them, which calibration does not reach."""
        assert flops_per_token(arctic(), 0) == within_a_thousandth(2 * (17.09e9 - 32000 * 7168))
        assert flops_per_token(arctic(), 512) - flops_per_token(arctic(), 0) == 4 * 512 * 7168 * 35


class TestReading:
    @pytest.mark.parametrize("path", [ARCTIC_DIR, ARCTIC_DIR / "config.json"], ids=["directory", "file"])
    def test_a_configuration_is_enough(self, path: Path) -> None:
        assert read_source(path) == source_from_config(arctic())

    def test_a_configuration_of_any_name(self, tmp_path: Path) -> None:
        (tmp_path / "base.json").write_text(json.dumps(BASE))
        source = read_source(tmp_path / "base.json")
        assert source.checkpoint_bytes == 963_334_844_416
        assert len(source.notices) == 1 and "states 56 KV heads" in source.notices[0]

    def test_headers_are_read_where_weights_are(self, tmp_path: Path) -> None:
        hollow_checkpoint(tmp_path)
        source = read_source(tmp_path)
        assert source.from_headers and source.notices == ()
        assert (source.checkpoint_bytes, source.num_tensors) == (SMALL_BYTES, 3 + 3 * (11 + 4 * 3))
        by_config = read_source(tmp_path / "config.json")
        assert not by_config.from_headers and replace(by_config, from_headers=True) == source

    def test_repeated_kv_heads_are_seen_in_the_weights(self, tmp_path: Path) -> None:
        raw = {**SMALL, "num_key_value_heads": 8}
        hollow_checkpoint(tmp_path, raw, kv_repeats=4)
        source = read_source(tmp_path)
        assert source.config.num_key_value_heads == 2
        assert source.checkpoint_bytes == source_from_config(arctic(raw)).checkpoint_bytes
        assert source.notices == ("Each KV head is stored 4 times: quantize folds 8 heads to 2.",)

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda path: path.unlink(), "00002.safetensors does not exist"),
            (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "is a Git-LFS pointer"),
            (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is truncated"),
        ],
        ids=["missing", "pointer", "truncated"],
    )
    def test_incomplete_weights_are_said_and_computed(self, damage: Any, said: str, tmp_path: Path) -> None:
        damage(hollow_checkpoint(tmp_path)[1])
        source = read_source(tmp_path)
        assert (source.checkpoint_bytes, source.from_headers) == (SMALL_BYTES, False)
        assert "follow from config.json alone" in source.notices[0] and said in source.notices[0]

    def test_no_configuration(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "config.json", tmp_path / "nowhere" / "x.json"):
            with pytest.raises(UsageError, match=r"\.json does not exist"):
                read_source(path)

    def test_a_configuration_of_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**ARCTIC, "architectures": ["MixtralForCausalLM"]}))
        with pytest.raises(UsageError, match="MixtralForCausalLM"):
            read_source(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(UsageError, match="not valid JSON"):
            read_source(tmp_path)


def test_the_figures_are_json() -> None:
    figures = json.loads(json.dumps(plan().as_dict()))
    assert figures["output_bytes"] == sum(figures["rank_bytes"])
    assert {"name", "count", "gpu_memory_bytes", "needed_bytes_per_gpu", "fits"} <= set(figures["gpus"][0])

"""The checks of scripts/check_gpu. Each takes a place and gives rows: what was looked at, whether it is well, figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import kernel_check
import logits_check
import torch
from device_trace import GRAPH_LAUNCH, LAUNCHES, SYNCHRONIZING, driver_calls, record
from logits_check import Forward, Rounded, Sizes
from rank_probe import SMALL, choose_ops, held_words, make_cpu_network, make_network, random_weights, same_again, steps_of
from torch import Tensor

from arctic_trt.checkpoint.mapped import MappedFile
from arctic_trt.checkpoint.trtllm import TrtCheckpoint
from arctic_trt.engine.config import plan_build_config, read_engine_config
from arctic_trt.engine.torch.build import build_torch_engine, plan_torch_build
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.layer import AttentionWeights, MlpWeights, on_device
from arctic_trt.model.mapping import Rank, plan_mapping
from arctic_trt.quantize.fp8 import cast_e4m3, scale_from_amax
from arctic_trt.quantize.pipeline import run_quantization
from arctic_trt.quantize.plan import plan_quantization
from arctic_trt.quantize.scales import quantize_attention, quantize_mlp
from arctic_trt.recipes import QuantizeRecipe
from arctic_trt.report.arctic import RELEASED
from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.communicator import SoloCommunicator
from arctic_trt.runtime.cuda.library import Thresholds
from arctic_trt.runtime.cuda.network import CudaNetwork
from arctic_trt.runtime.cuda.ops import FusedOps
from arctic_trt.runtime.cuda.twin import TwinOps
from arctic_trt.runtime.cuda.upload import Uploader
from arctic_trt.runtime.kv_cache import CPU, KvCache
from arctic_trt.runtime.step import LIKELIEST, Choice
from arctic_trt.runtime.weights import RankWeights, load_rank
from arctic_trt.runtime.worker import load_worker

Row = tuple[str, bool | None, str]
"""What was looked at, whether it is as it should be (None: it was not looked at), and figures."""
TINY = Path(__file__).resolve().parents[1] / "tests" / "data" / "tiny-arctic"
TINY_POSITIONS = 512
TP_SIZE = 8
GRAPHS = [1, 2, 4]
CHOICES = [
    LIKELIEST,
    Choice(temperature=0.7, uniform=0.9),
    Choice(top_k=40, uniform=0.3),
    Choice(top_p=0.9, min_p=0.01, uniform=0.6),
]
ACTIVATION_SCALES_APART = 2.0**-5
"""Four roundings to bf16: a site's input has passed several products, each added up in an order of its device."""
LOAD_SHARE = 0.7


@dataclass(frozen=True)
class Size:
    """How much is computed: a rank's model, the steps of the comparisons, and bytes to upload."""

    config: ArcticConfig
    logits: Sizes
    decodes: tuple[int, ...]
    prefills: tuple[int, ...]
    context: int
    load_bytes: int


SIZES = {
    "full": Size(
        RELEASED.model_copy(update={"num_hidden_layers": 2}),
        Sizes(160, (100, 60), 16),
        (1, 8, 32, 128),
        (16, 128, 2048),
        2048,
        4 << 30,
    ),
    "small": Size(SMALL, Sizes(72, (20, 20), 4), (1, 2), (40,), 64, 1 << 20),
}


@dataclass
class Place:
    """The device, and what several checks share, made when first asked for."""

    device: torch.device
    size: Size
    directory: Path
    choose_ops: Callable[[ArcticConfig, Rank, torch.device, Thresholds], FusedOps] = field(default=choose_ops)

    @cached_property
    def weights(self) -> RankWeights:
        """Of the full-width rank, made by the CPU, on the device."""
        return random_weights(self.size.config, self.rank, CPU, lambda weight: weight.to(self.device))

    @cached_property
    def engine_dir(self) -> Path:
        """The tiny shipped model, quantized and built for one rank."""
        quantize_tiny(self.directory / "cpu", "cpu")
        checkpoint = TrtCheckpoint(self.directory / "cpu")
        build_torch_engine(plan_torch_build(checkpoint, self.directory / "engine", plan_build_config(checkpoint.config)))
        checkpoint.close()
        return self.directory / "engine"

    @property
    def rank(self) -> Rank:
        """Of the full width."""
        return plan_mapping(self.size.config, tp_size=TP_SIZE).rank(0)

    def ops(self, config: ArcticConfig, rank: Rank) -> FusedOps:
        """What the device computes ``rank`` with."""
        return self.choose_ops(config, rank, self.device, Thresholds())

    def rank_network(self, ops: FusedOps, room: KvRoom, graphs: list[int]) -> CudaNetwork:
        """The full-width rank on the device."""
        config, rank = self.size.config, self.rank
        graphs, positions = (
            graphs if self.device.type == "cuda" else [],
            min(2 * self.size.context, config.max_position_embeddings),
        )
        return make_network(config, rank, ops, self.device, room=room, max_seq_len=positions, graphs=graphs, weights=self.weights)

    def tiny_network(self, ops: FusedOps, room: KvRoom, graphs: list[int]) -> CudaNetwork:
        """The tiny engine on the device."""
        config, mapping, quant = read_engine_config(self.engine_dir).network()
        rank = mapping.rank(0)
        weights = load_rank(self.engine_dir, config, rank, quant, Uploader(self.device))
        sizes = {"num_layers": len(weights.layers), "kv_heads": config.num_key_value_heads, "head_dim": config.head_dim}
        cache = KvCache(**sizes, fp8=quant.kv_fp8, device=self.device, spare_blocks=1)
        graphs = graphs if self.device.type == "cuda" else []
        parts = (config, rank, weights, cache, SoloCommunicator(), ops)
        network = CudaNetwork(*parts, device=self.device, max_seq_len=TINY_POSITIONS, graphs=graphs)
        cache.reserve(room)
        network.prepare(1)
        return network


def tiny_logits(place: Place) -> Iterator[Row]:
    """Logits of the tiny shipped model against the CPU engine's."""
    config, mapping, quant = read_engine_config(place.engine_dir).network()
    room = logits_check.room_for(place.size.logits)
    ours = load_worker(place.engine_dir, config, quant, mapping.rank(0), SoloCommunicator())
    ours.reserve(room)
    theirs = place.tiny_network(place.ops(config, mapping.rank(0)), room, GRAPHS)
    rounded = place.tiny_network(Rounded(TwinOps()), room, [])  # twins ask the device for numbers, which no graph can
    yield from _compare(ours.network, theirs, rounded, place.size.logits, room, config.vocab_size)


def rank_logits(place: Place) -> Iterator[Row]:
    """Logits of two layers of the full width, rank 0 of eight without the others, against the CPU engine's."""
    config, room = place.size.config, logits_check.room_for(place.size.logits)
    ours = make_cpu_network(config, place.rank, room)
    theirs = place.rank_network(place.ops(config, place.rank), room, GRAPHS)
    rounded = place.rank_network(Rounded(TwinOps()), room, [])
    yield from _compare(ours, theirs, rounded, place.size.logits, room, held_words(config, ours.rank))


def _compare(
    ours: Forward, network: CudaNetwork, rounded: CudaNetwork, sizes: Sizes, room: KvRoom, columns: int
) -> Iterator[Row]:
    plan = logits_check.plan_steps(sizes, columns, room)
    wanted, found, bound = (logits_check.logits_of(each, plan, columns) for each in (ours, network, rounded))
    yield from logits_check.rows_of(found, wanted, bound)


def kernels(place: Place) -> Iterator[Row]:
    """Each operation of the full-width rank's steps against its twin."""
    both, size = kernel_check.BothWays(place.ops(place.size.config, place.rank), TwinOps()), place.size
    blocks = KvRoom(0).blocks_for(size.context)
    room = KvRoom(max(max(size.decodes) * blocks, KvRoom(0).blocks_for(max(size.prefills))))
    network = place.rank_network(both, room, [])
    both.found.clear()  # a network prepares itself with a step of nobody's tokens, whose results are anything
    plans = [(count, 1, size.context) for count in size.decodes] + [(1, count, count) for count in size.prefills]
    with torch.inference_mode():
        for sequences, tokens, end in plans:
            step, freed = steps_of(sequences, tokens, end, room, network, *CHOICES)
            network.cache.assign(step)
            network.forward(step)
            network.cache.assign(freed)
    yield from both.rows()


def launches(place: Place) -> Iterator[Row]:
    """What one decode step asks of the driver, and whether anything in it waits for the device."""
    if place.device.type != "cuda":
        yield "decode step", None, "needs a GPU"
        return
    context, room = place.size.context, KvRoom(4 * KvRoom(0).blocks_for(place.size.context))
    network = place.rank_network(place.ops(place.size.config, place.rank), room, GRAPHS)
    for sequences in (1, 3):
        step, freed = steps_of(sequences, 1, context, room, network, LIKELIEST)
        network.cache.assign(step)
        again = same_again(step)
        with torch.inference_mode():
            for _ in range(3):
                network.forward(again)
            torch.cuda.synchronize()
            calls = driver_calls(record(lambda: network.forward(again)))  # noqa: B023 - called at once
            yield f"driver calls, {sequences} sequences", *judge_calls(calls)
            torch.cuda.set_sync_debug_mode("error")
            try:
                network.forward(again)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        yield f"no waiting, {sequences} sequences", True, "torch noticed none"
        network.cache.assign(freed)


def judge_calls(calls: dict[str, int]) -> tuple[bool, str]:
    """One launch of a graph, no other kernel's, nothing that waits."""
    graphs, others = calls.get(GRAPH_LAUNCH, 0), sum(calls.get(name, 0) for name in LAUNCHES)
    waits = sum(calls.get(name, 0) for name in SYNCHRONIZING)
    all_calls = ", ".join(f"{name} {count}" for name, count in sorted(calls.items()))
    return graphs == 1 and not others and not waits, f"{graphs} graphs, {others} kernels, {waits} waits ({all_calls})"


def quantization(place: Place) -> Iterator[Row]:
    """Scales and codes that the device computes against the CPU's: bit for bit."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = bits[bits.isfinite()]
    scales = scale_from_amax(finite.abs())
    yield _bits("scale of every bf16 amax", scale_from_amax(finite.abs().to(place.device)).cpu(), scales)
    chosen = scales[torch.linspace(0, len(scales) - 1, 64).long()]
    for name, values in (("codes of every bf16 number", finite), ("codes of every float32 exponent", _all_exponents())):
        wanted = torch.stack([cast_e4m3(values, scale) for scale in chosen])
        found = torch.stack([cast_e4m3(values.to(place.device), scale.to(place.device)).cpu() for scale in chosen])
        yield _bits(name, found, wanted)
    yield from _quantize_layer(place)
    yield from _quantize_tiny(place)


def _all_exponents() -> Tensor:
    """Float32 numbers with mantissas all over, of every exponent."""
    generator = torch.Generator().manual_seed(2)
    mantissa = torch.randint(0, 1 << 23, (255, 64), generator=generator)
    return ((torch.arange(255)[:, None] << 23) | mantissa).int().view(torch.float32).flatten()


def _quantize_layer(place: Place) -> Iterator[Row]:
    """Attention and one expert of the whole width."""
    config, generator = place.size.config, torch.Generator().manual_seed(3)
    hidden, ffn, kv = config.hidden_size, config.intermediate_size, config.kv_size

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()

    attention = AttentionWeights(made(hidden, hidden), made(kv, hidden), made(kv, hidden), made(hidden, hidden))
    expert = MlpWeights(w1=made(ffn, hidden), w2=made(hidden, ffn), w3=made(ffn, hidden))
    every = frozenset({"attention.qkv", "attention.dense", "mlp.fc", "mlp.proj"})
    for name, parts, work in (
        ("attention of a layer", attention, lambda given: quantize_attention(given, "layer", every)),
        ("an expert", expert, lambda given: quantize_mlp(given, "expert", every, expert=True)),
    ):
        (codes, scales), (here, here_scales) = work(parts), work(on_device(parts, str(place.device)))
        same = all(torch.equal(scales[key], here_scales[key].cpu()) for key in scales)
        pairs = [(getattr(here, each.name).cpu(), getattr(codes, each.name)) for each in fields(codes)]
        apart = sum(int((_as_bits(one) != _as_bits(other)).sum()) for one, other in pairs)
        yield f"{name}, full width", same and not apart, f"{apart} codes differ, weight scales {'equal' if same else 'differ'}"


def _quantize_tiny(place: Place) -> Iterator[Row]:
    """The tiny model through the whole of quantize, there and here."""
    assert place.engine_dir, "made from the CPU's checkpoint"
    quantize_tiny(place.directory / "there", place.device.type)
    theirs, ours = (MappedFile(place.directory / name / "rank0.safetensors") for name in ("there", "cpu"))
    names = [name for name in ours.tensors if not name.endswith(("activation_scaling_factor", "cache_scaling_factor"))]
    differ = [name for name in names if not torch.equal(_as_bits(theirs.read(name)), _as_bits(ours.read(name)))]
    yield "tiny model: weights and their scales", not differ, f"{len(names)} tensors, {len(differ)} differ {differ[:3]}"
    rest = [name for name in ours.tensors if name not in names]
    apart = max(float(((theirs.read(name) - ours.read(name)) / ours.read(name)).abs().max()) for name in rest)
    figures = f"{len(rest)} scales, {apart:.2e} apart (at most {ACTIVATION_SCALES_APART:.2e}: products round as the device does)"
    yield "tiny model: scales of activations", apart <= ACTIVATION_SCALES_APART, figures


def quantize_tiny(output_dir: Path, device: str) -> None:
    """Quantize the tiny shipped model with calibration on ``device``."""
    samples = output_dir.parent / "samples.jsonl"
    ids = torch.randint(0, 500, (8, 64), generator=torch.Generator().manual_seed(4)).tolist()
    samples.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids), encoding="utf-8")
    recipe = QuantizeRecipe(model_dir=TINY, output_dir=output_dir, calib_dataset=str(samples), tp_size=1, device=device)
    run_quantization(plan_quantization(recipe))


def _bits(name: str, found: Tensor, wanted: Tensor) -> Row:
    apart = int((_as_bits(found) != _as_bits(wanted)).sum())
    return name, apart == 0, f"{apart} of {wanted.numel()} differ"


def _as_bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def loading(place: Place) -> Iterator[Row]:
    """Bytes a second from a mapped file in the page cache to the device, beside copies within the host and from pinned memory."""
    from safetensors.torch import save_file

    part = min(256 << 20, place.size.load_bytes)
    path = place.directory / "upload.safetensors"
    whole = torch.randint(0, 256, (part,), dtype=torch.uint8).view(torch.float8_e4m3fn)
    save_file({f"part{index}": whole.clone() for index in range(place.size.load_bytes // part)}, path)
    file, uploader = MappedFile(path), Uploader(place.device)
    sent = [uploader.hold(file.read(name)) for name in list(file.tensors)[:1]]  # a first time, that does not count
    rate = (
        len(file.tensors) * part / _seconds(place, lambda: sent.extend(uploader.hold(file.read(name)) for name in file.tensors))
    )
    same = all(torch.equal(_as_bits(tensor.cpu()), _as_bits(whole)) for tensor in sent)
    buffer, target = torch.empty_like(whole, pin_memory=place.device.type == "cuda"), torch.empty_like(sent[0])
    host = part / min(_seconds(place, lambda: buffer.copy_(whole)) for _ in range(4))
    bus = part / min(_seconds(place, lambda: target.copy_(buffer, non_blocking=True)) for _ in range(4))
    path.unlink()
    yield "bytes of an upload", same, "equal" if same else "differ"
    figures = f"{rate / 1e9:.1f} GB/s; within the host {host / 1e9:.1f}, from pinned memory {bus / 1e9:.1f}"
    fast = rate >= LOAD_SHARE * min(host, bus) if place.device.type == "cuda" else None
    yield f"rate, at least {LOAD_SHARE} of the slower", fast, figures


def _seconds(place: Place, work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if place.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class Check:
    """A check, and the seconds that it should take on one H200 at most, kernels' first compilation included."""

    run: Callable[[Place], Iterator[Row]]
    limit_s: int


CHECKS = {
    "tiny": Check(tiny_logits, 120),
    "rank": Check(rank_logits, 180),
    "kernels": Check(kernels, 240),
    "launches": Check(launches, 60),
    "quantize": Check(quantization, 90),
    "load": Check(loading, 60),
}

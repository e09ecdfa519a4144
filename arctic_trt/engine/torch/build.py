"""Building a torch engine: each rank's checkpoint file is read once, repacked tensor by tensor, and written beside a plan.

No more than one expert's matrix, or one dense weight, of each rank at work is in memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from arctic_trt.checkpoint.contract import rank_file
from arctic_trt.checkpoint.digests import DIGESTS, crc_text, file_crc, join_crcs, read_digests, tensor_crcs
from arctic_trt.checkpoint.layout import FileLayout, plan_layout
from arctic_trt.checkpoint.output_dir import OutputDir, check_occupied, check_space
from arctic_trt.checkpoint.tensors import TensorFile, TensorFileWriter
from arctic_trt.checkpoint.trtllm import TrtCheckpoint
from arctic_trt.engine.config import TORCH, BuildConfig, check_engine_dir, plan_engine_config
from arctic_trt.engine.torch.format import EngineTensor, How, plan_engine_tensors, weight_scale_twins
from arctic_trt.errors import CheckpointError
from arctic_trt.model import tokenizer
from arctic_trt.model.mapping import Rank


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchBuildPlan:
    """A build whose inputs have been checked and whose output is known to the byte; ``layouts`` are in rank order.

    ``recorded`` are the digests of the checkpoint's files, empty where it came without.
    """

    checkpoint: TrtCheckpoint
    output_dir: Path
    build_config: BuildConfig
    layouts: list[FileLayout]
    side_files: list[str]
    recorded: Mapping[str, Mapping[str, str]]
    overwrite: bool

    @property
    def output_bytes(self) -> int:
        return sum(layout.total_bytes for layout in self.layouts)


@dataclass(frozen=True, slots=True)
class RankBuilt:
    """A rank file that is complete on disk, with the CRC-32 of its tensors."""

    rank: int
    num_bytes: int
    seconds: float
    crcs: Mapping[str, str]


OnRank = Callable[[RankBuilt], None]


def plan_torch_build(
    checkpoint: TrtCheckpoint, output_dir: Path, build_config: BuildConfig, *, overwrite: bool = False
) -> TorchBuildPlan:
    """Decide what will be written, without writing it.

    Raises :class:`RefusedError` where the output directory is the checkpoint, holds an engine (unless ``overwrite``) or
    anything else, or lies on a disk that is too full.
    """
    digests = read_digests(checkpoint.checkpoint_dir)
    check_engine_dir(output_dir, checkpoint.checkpoint_dir)
    check_occupied(output_dir, overwrite=overwrite)
    ranks = checkpoint.mapping.ranks()
    tensors = [plan_engine_tensors(checkpoint.config, rank, checkpoint.quant) for rank in ranks]
    plan = TorchBuildPlan(
        checkpoint=checkpoint,
        output_dir=output_dir,
        build_config=build_config,
        layouts=[plan_layout([tensor.spec for tensor in of_rank], {"format": "pt"}) for of_rank in tensors],
        side_files=[name for name in tokenizer.FILES if (checkpoint.checkpoint_dir / name).is_file()],
        recorded=digests.tensors if digests else {},
        overwrite=overwrite,
    )
    check_space(output_dir, plan.output_bytes)
    return plan


def build_torch_engine(plan: TorchBuildPlan, *, workers: int = 1, on_rank: OnRank = lambda built: None) -> list[RankBuilt]:
    """Carry out ``plan`` with ``workers`` ranks at a time; the engine appears whole or not at all.

    ``on_rank`` is called from this thread as each rank file becomes complete. Raises :class:`CheckpointError` for scales that
    cannot be joined, and for tensors that are not what the checkpoint's record of digests says.
    """
    with OutputDir(plan.output_dir, kind="engine", overwrite=plan.overwrite) as out:
        built = _build_ranks(plan, workers, on_rank)
        for name in plan.side_files:
            out.copy(plan.checkpoint.checkpoint_dir / name, name)
        files = {name: file_crc(plan.output_dir / name) for name in plan.side_files}
        out.write_json(DIGESTS, {"files": files, "tensors": {rank_file(each.rank): each.crcs for each in built}})
        out.write_json("config.json", plan_engine_config(TORCH, plan.checkpoint.raw_config, plan.build_config))
    return built


def _build_ranks(plan: TorchBuildPlan, workers: int, on_rank: OnRank) -> list[RankBuilt]:
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=max(1, min(workers, len(plan.layouts))), thread_name_prefix="build") as pool:
        futures = [pool.submit(_build_rank, plan, rank, stop) for rank in plan.checkpoint.mapping.ranks()]
        try:
            for built in _as_completed(futures):
                on_rank(built)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _as_completed(futures: list[Future[RankBuilt]]) -> Iterator[RankBuilt]:
    """Results in the order in which they become ready; the first failure is raised as soon as it is known."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        yield from sorted((future.result() for future in done), key=lambda built: built.rank)


def _build_rank(plan: TorchBuildPlan, rank: Rank, stop: threading.Event) -> RankBuilt:
    began, layout = time.perf_counter(), plan.layouts[rank.index]
    source = plan.checkpoint.file(rank.index)
    target = TensorFileWriter(plan.output_dir / rank_file(rank.index), layout)
    recorded = plan.recorded.get(source.path.name, {})
    crcs: dict[str, str] = {}
    try:
        for tensor in plan_engine_tensors(plan.checkpoint.config, rank, plan.checkpoint.quant):
            if stop.is_set():
                raise InterruptedError(f"rank {rank.index} was given up because another rank failed")
            repack(tensor, source, target)
            crcs |= tensor_crcs([target.take_crcs()], {tensor.spec.name: tensor.spec.num_bytes})
            _check_crc(crcs[tensor.spec.name], tensor, recorded, source)
        target.finish()
    except BaseException:
        target.abandon()
        raise
    return RankBuilt(rank.index, layout.total_bytes, time.perf_counter() - began, crcs)


def repack(tensor: EngineTensor, source: TensorFile, target: TensorFileWriter) -> None:
    """Make one engine tensor from the checkpoint file ``source``; raises :class:`CheckpointError` where scales disagree."""
    _require_equal(weight_scale_twins(tensor), source)
    name, sources = tensor.spec.name, tensor.sources
    if tensor.how is How.JOIN:
        for index, part in enumerate(_parts(tensor, source)):
            target.write(name, part, index)
    elif tensor.how is How.SAME:
        _require_equal(sources, source)
        target.write(name, source.read(sources[0]))
    elif tensor.how is How.PRODUCT:
        target.write(name, source.read(sources[0]) * source.read(sources[1]))
    else:
        target.write(name, source.read(sources[0]).reciprocal())


def _parts(tensor: EngineTensor, source: TensorFile) -> Iterator[Tensor]:
    """Equal parts of a joined tensor in order: whole sources, but one matrix at a time where a source is a stack of them."""
    for name in tensor.sources:
        shape = source.tensors[name].spec.shape
        step = 1 if len(shape) == 3 else shape[0]
        for begin in range(0, shape[0], step):
            yield source.read_rows(name, begin, begin + step)


def recorded_crc(tensor: EngineTensor, recorded: Mapping[str, str]) -> str | None:
    """The CRC-32 that ``tensor`` has by those of its sources, where it is made of their bytes and all of them are recorded."""
    sources = {How.JOIN: tensor.sources, How.SAME: tensor.sources[:1]}.get(tensor.how, ())
    if not sources or not recorded.keys() >= set(sources):
        return None
    return crc_text(join_crcs((int(recorded[name], 16) for name in sources), tensor.spec.num_bytes // len(sources)))


def _check_crc(crc: str, tensor: EngineTensor, recorded: Mapping[str, str], source: TensorFile) -> None:
    expected = recorded_crc(tensor, recorded)
    if expected not in (None, crc):
        raise CheckpointError(
            f"{' and '.join(tensor.sources)} of {source.path} {'are' if len(tensor.sources) > 1 else 'is'} not what was written "
            f"there: CRC-32 {crc}, {DIGESTS} gives {expected}.",
            f"Copy the checkpoint again; where it was changed on purpose, remove its {DIGESTS}.",
        )


def _require_equal(names: tuple[str, ...], source: TensorFile) -> None:
    for name in names[1:]:
        expected, found = source.read(names[0]), source.read(name)
        if not found.equal(expected):
            raise CheckpointError(
                f"{source.path} has {name}={found.tolist()} but {names[0]}={expected.tolist()}: the two projections read the "
                "same input in one multiplication and must share their scales.",
                "Quantize again with arctic-trt quantize.",
            )

"""Many small worlds inside one MPI job, because starting a job takes longer than all that is tested in it.

``mpirun -n 8 python -m tests.support.parallel_worlds WORK_DIR`` reads ``WORK_DIR/plan.json``: ``{"prompts": {MODEL: [[ids]]},
"max_output_len": N, "rounds": [[[MODEL, ENGINE_DIR, WORLD_SIZE, NAME], ...], ...]}``. The worlds of a round run side by side
on neighbouring ranks, and each writes ``WORK_DIR/NAME.npz`` with ``tokens`` and the prompts' ``logits``. What the collectives
did is in ``WORK_DIR/collectives.json``. Worlds of two ranks then complete every prompt twice with little room, ``crowded``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from arctic_trt.engine.config import read_engine_config
from arctic_trt.errors import ArcticTrtError, CheckpointError
from arctic_trt.model.mapping import Mapping
from arctic_trt.runtime.batcher import Batcher, generate
from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.communicator import MpiCommunicator, agreement
from arctic_trt.runtime.completion import Completion, Listeners
from arctic_trt.runtime.requests import plan_requests
from arctic_trt.runtime.sampler import Sampling
from arctic_trt.runtime.worker import load_worker

torch.set_num_threads(1)
WORLD = MPI.COMM_WORLD
SCARCE = KvRoom(13, block_tokens=4)  # just enough for the longest sequence


def main(work_dir: Path) -> None:
    plan = json.loads((work_dir / "plan.json").read_text())
    check_collectives(work_dir)
    for worlds in plan["rounds"]:
        begin = 0
        for model, engine_dir, size, name in worlds:
            member = begin <= WORLD.rank < begin + size
            group = WORLD.Split(0 if member else MPI.UNDEFINED, WORLD.rank)
            if member:
                run_world(group, Path(engine_dir), plan["prompts"][model], plan["max_output_len"], work_dir / f"{name}.npz")
            begin += size


def run_world(group: Any, engine_dir: Path, prompts: list[list[int]], max_output_len: int, target: Path) -> None:
    engine = read_engine_config(engine_dir)
    config, mapping, quant = engine.network()
    comm = MpiCommunicator(mapping, group)
    worker = load_worker(engine_dir, config, quant, mapping.rank(comm.rank), comm)
    worker.reserve(KvRoom(64))
    if comm.rank:
        worker.follow()
        worker.reserve(SCARCE)
        worker.follow()
        return
    requests = plan_requests(
        prompts, engine.build_config, config.vocab_size, max_new_tokens=max_output_len, sampling=Sampling(), prompt_logits=True
    )
    logits = np.zeros((len(prompts), max(map(len, prompts)), config.vocab_size), np.float32)

    def keep(index: int, start: int, rows: torch.Tensor) -> None:
        logits[index, start : start + len(rows)] = rows.numpy()

    arrived: dict[int, Completion] = {}
    completions = generate(
        worker.lead, requests, engine.build_config, room=worker.room, listeners=Listeners(on_prompt_logits=keep)
    )
    worker.dismiss()
    worker.reserve(SCARCE)
    crowded = [replace(each, index=index, prompt_logits=False) for index, each in enumerate(requests * 2)]
    batcher = Batcher(worker.lead, engine.build_config, room=SCARCE, listeners=Listeners(on_done=arrived.__setitem__))
    for request in crowded if comm.world_size == 2 else ():
        batcher.add(request)
    while not batcher.idle:
        batcher.step()
    worker.dismiss()
    np.savez(
        target,
        tokens=np.array([completion.token_ids for completion in completions]),
        logits=logits,
        crowded=np.array([arrived[index].token_ids for index in sorted(arrived)]),
        preemptions=batcher.stats.preemptions,
        reused_tokens=batcher.stats.reused_tokens,
    )


def check_collectives(work_dir: Path) -> None:
    comm = MpiCommunicator(Mapping(tp_size=4, pp_size=2, moe_tp_size=4, moe_ep_size=1), WORLD)
    found: dict[str, Any] = {"sums": []}
    for size, dtype in (
        (1, torch.float32),
        (3, torch.float64),
        (4, torch.float32),
        (1000, torch.float64),
        (100_003, torch.float32),
    ):
        draws = [torch.randn(size, generator=torch.Generator().manual_seed(rank)) for rank in range(8)]
        parts = [draw.to(dtype) * 10.0**rank for rank, draw in enumerate(draws)]
        group = parts[comm.rank // 4 * 4 :][:4]
        expected = ((group[0] + group[1]) + group[2]) + group[3]
        mine = parts[comm.rank].clone()
        comm.all_reduce(mine)
        digests = comm.gather_all(hashlib.sha256(mine.numpy().tobytes()).hexdigest())
        found["sums"].append([size, mine.equal(expected), len(set(digests[:4])), len(set(digests[4:]))])
    columns = torch.arange(6.0).view(2, 3) + 10 * comm.rank
    found["gathered"] = comm.gather_all(comm.all_gather(columns).tolist())
    for size in (0, 1, 255, 256, 5000):
        sent = np.arange(size, dtype=np.int32)
        same = comm.broadcast(sent if comm.rank == 0 else None).tolist() == sent.tolist()
        found.setdefault("broadcasts", []).append(all(comm.gather_all(same)))
    if comm.rank >= 4:
        received = comm.receive((2, 3), comm.rank - 4)
        found["received"] = received.equal(torch.full((2, 3), float(comm.rank - 4)))
    else:
        comm.send(torch.full((3, 2), float(comm.rank)).T, comm.rank + 4)
    found["received"] = comm.gather_all(found.get("received"))
    found["failures"] = comm.gather_all(failure(comm))
    if comm.rank == 0:
        (work_dir / "collectives.json").write_text(json.dumps(found))


def failure(comm: MpiCommunicator) -> list[Any]:
    try:
        with agreement(comm):
            if comm.rank in (3, 6):
                raise CheckpointError(f"file {comm.rank} is broken.", "Mend it.")
    except ArcticTrtError as error:
        return [str(error), error.exit_code]
    return []


main(Path(sys.argv[1]))

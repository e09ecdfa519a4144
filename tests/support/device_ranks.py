"""Under mpirun on four ranks: what GPUs' ranks say to each other, over gloo between CPUs.

``python -m tests.support.device_ranks WORK_DIR`` tries every verb on two stages of two. Then it reads ``WORK_DIR/plan.json``:
``{"prompts": {MODEL: [[ids]]}, "rounds": [[[MODEL, ENGINE_DIR, WORLD_SIZE, NAME], ...], ...]}``. The worlds of a round run side
by side, and rank 0 of each writes ``WORK_DIR/NAME.npz`` with the logits of :func:`mixed_steps`. A world is left before the next.
At last rank 3 dies while the others wait as one waits for a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from arctic_trt.engine.config import read_engine_config
from arctic_trt.model.mapping import Mapping
from arctic_trt.runtime.communicator import MpiCommunicator
from arctic_trt.runtime.cuda.communicator import DeviceCommunicator
from tests.support.cuda_networks import mixed_steps, twin_worker

torch.set_num_threads(1)
WORLD = MPI.COMM_WORLD
CPU = torch.device("cpu")


def main(work_dir: Path) -> None:
    try_verbs(Mapping(tp_size=2, pp_size=2, moe_tp_size=2, moe_ep_size=1))
    plan = json.loads((work_dir / "plan.json").read_text())
    for worlds in plan["rounds"]:
        begin = 0
        for model, engine_dir, size, name in worlds:
            member = begin <= WORLD.rank < begin + size
            group = WORLD.Split(0 if member else MPI.UNDEFINED, WORLD.rank)
            if member:
                run_world(group, Path(engine_dir), plan["prompts"][model], work_dir / f"{name}.npz")
            begin += size
    WORLD.Barrier()
    if WORLD.rank == 0:
        print("all agree", flush=True)
    WORLD.Barrier()
    if WORLD.rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    ctypes.CDLL(None).sleep(1000)  # in C, where no exception of Python's would end it


def try_verbs(mapping: Mapping) -> None:
    comm = DeviceCommunicator(MpiCommunicator(mapping, WORLD), mapping, CPU, backend="gloo")
    place, stage = mapping.rank(comm.rank).tp_rank, mapping.rank(comm.rank).pp_rank
    x = torch.full((2, 3), 10.0**comm.rank)
    comm.all_reduce(x)
    assert x.unique().tolist() == [10.0 ** (2 * stage) + 10.0 ** (2 * stage + 1)]
    for dtype in (torch.float32, torch.bfloat16):
        y = torch.randn(7168, generator=torch.Generator().manual_seed(comm.rank)).to(dtype)
        comm.all_reduce(y)
        digests = comm.gather_all(hashlib.sha256(y.view(torch.uint8).numpy().tobytes()).hexdigest())
        assert digests[0] == digests[1] != digests[2] == digests[3]
    gathered = comm.all_gather(torch.tensor([[place, place], [5.0, 6.0 + place]]))
    assert gathered.tolist() == [[0, 0, 1, 1], [5, 6, 5, 7]]
    if stage == 0:
        comm.send(torch.full((4,), 1.5 + comm.rank)[::2], comm.rank + 2)
    else:
        assert comm.receive((2,), comm.rank - 2).tolist() == [1.5 + comm.rank - 2] * 2
    said = comm.broadcast(np.array([3, 4], np.int32) if comm.rank == 0 else None)
    assert said.tolist() == [3, 4] and comm.gather_all(comm.rank) == [0, 1, 2, 3]
    comm.close()


def run_world(group: Any, engine_dir: Path, prompts: list[list[int]], target: Path) -> None:
    _, mapping, _ = read_engine_config(engine_dir).network()
    comm = DeviceCommunicator(MpiCommunicator(mapping, group), mapping, CPU, backend="gloo")
    worker = twin_worker(engine_dir, comm)
    if comm.rank:
        worker.follow()
    else:
        found = [outcome.logits() for step in mixed_steps(prompts) if (outcome := worker.lead(step))]
        worker.dismiss()
        np.savez(target, *[logits_WV.numpy() for logits_WV in found])
    comm.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

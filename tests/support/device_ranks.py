"""Under mpirun on four ranks, two stages of two: every verb of the communicator that GPUs use, over gloo between CPUs."""

from __future__ import annotations

import numpy as np
import torch

from arctic_trt.model.mapping import Mapping
from arctic_trt.runtime.communicator import connect
from arctic_trt.runtime.cuda.communicator import DeviceCommunicator


def main(mapping: Mapping) -> None:
    comm = DeviceCommunicator(connect(mapping), mapping, torch.device("cpu"), backend="gloo")
    place, stage = mapping.rank(comm.rank).tp_rank, mapping.rank(comm.rank).pp_rank
    x = torch.full((2, 3), 10.0**comm.rank)
    comm.all_reduce(x)
    assert x.unique().tolist() == [10.0 ** (2 * stage) + 10.0 ** (2 * stage + 1)]
    gathered = comm.all_gather(torch.tensor([[place, place], [5.0, 6.0 + place]]))
    assert gathered.tolist() == [[0, 0, 1, 1], [5, 6, 5, 7]]
    if stage == 0:
        comm.send(torch.full((4,), 1.5 + comm.rank)[::2], comm.rank + 2)
    else:
        assert comm.receive((2,), comm.rank - 2).tolist() == [1.5 + comm.rank - 2] * 2
    said = comm.broadcast(np.array([3, 4], np.int32) if comm.rank == 0 else None)
    assert said.tolist() == [3, 4] and comm.gather_all(comm.rank) == [0, 1, 2, 3]
    if comm.rank == 0:
        print("all agree")


if __name__ == "__main__":
    main(Mapping(tp_size=2, pp_size=2, moe_tp_size=2, moe_ep_size=1))

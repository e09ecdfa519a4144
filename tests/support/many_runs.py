"""Several command lines in one MPI job, because starting a job takes longer than all that is tested in it.

``mpirun -n N python -m tests.support.many_runs PLAN.json`` runs each of a list of command lines on all ranks, one after the
other, and writes the exit codes of rank 0 to ``PLAN.json.done``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from arctic_trt.cli.main import run_cli

torch.set_num_threads(1)


def main(plan: Path) -> None:
    codes = [run_cli(argv) for argv in json.loads(plan.read_text())]
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 0:
        plan.with_suffix(".done").write_text(json.dumps(codes))


main(Path(sys.argv[1]))

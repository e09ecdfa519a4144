"""Quantization by several processes: joining the others."""

from __future__ import annotations

from arctic_trt.errors import RefusedError
from arctic_trt.launch import Launch
from arctic_trt.quantize.team import MpiTeam, Solo, Team

MAX_EXPERTS_PER_TOKEN = 2


def join_team(launch: Launch | None, experts_per_token: int) -> Team:
    """The team that ``launch`` describes: this process alone, or all that were started under mpirun or srun.

    Raises :class:`RefusedError` without mpi4py, and for a model that routes a token to more than two experts, whose sums would
    depend on who adds up what.
    """
    if launch is None or launch.world_size == 1:
        return Solo()
    if experts_per_token > MAX_EXPERTS_PER_TOKEN:
        raise RefusedError(
            f"num_experts_per_tok={experts_per_token}: beyond {MAX_EXPERTS_PER_TOKEN} the order of additions would depend on the "
            "number of processes.",
            "Run it as one process.",
        )
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RefusedError(
            f"Quantizing with several processes needs mpi4py and an MPI library ({' '.join(str(error).split())}).",
            "pip install 'arctic-trt[mpi]'",
        ) from None
    return MpiTeam(MPI.COMM_WORLD)

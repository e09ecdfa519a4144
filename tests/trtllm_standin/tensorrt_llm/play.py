"""What the stand-in plays: a version, a number of GPUs, faults. Calls are recorded as JSON lines.

The environment decides, so that processes started by the program under test play the same part:
``TRTLLM_STANDIN_VERSION`` (1.2.1), ``TRTLLM_STANDIN_LOG`` (a file; nothing is recorded without), ``TRTLLM_STANDIN_GPUS`` (8),
``TRTLLM_STANDIN_SM`` (90), ``TRTLLM_STANDIN_FAIL_RANK`` and ``TRTLLM_STANDIN_DIE_RANK`` (numbers with commas between them),
``TRTLLM_STANDIN_SLEEP`` (seconds that building a rank takes).
"""

from __future__ import annotations

import enum
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

VERSION = os.environ.get("TRTLLM_STANDIN_VERSION", "1.2.1")
RELEASE = tuple(int(part) for part in VERSION.split(".")[:2])
HAS_AUTO_PARALLEL = RELEASE < (1, 2)
"""1.2 removed automatic parallelism, and made its configurations pydantic models."""
IS_PYDANTIC = RELEASE >= (1, 2)
LAUNCHED_BY_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def device_count() -> int:
    """GPUs that CUDA would see, in place of ``torch.cuda.device_count``."""
    count = int(os.environ.get("TRTLLM_STANDIN_GPUS", "8"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else min(count, len([word for word in visible.split(",") if word.strip() not in ("", "-1")]))


def set_device(gpu_id: int) -> None:
    """In place of ``torch.cuda.set_device``, which fails for a GPU that is not there."""
    if not 0 <= gpu_id < device_count():
        raise RuntimeError(f"CUDA error: invalid device ordinal (GPU {gpu_id} of {device_count()})")


def sm_version() -> int:
    """The architecture of the GPUs, 90 for H100."""
    return int(os.environ.get("TRTLLM_STANDIN_SM", "90"))


def mpi_comm() -> Any:
    """The world communicator. Imports mpi4py, which initialises MPI."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


def is_under_mpi() -> bool:
    return any(name in os.environ for name in LAUNCHED_BY_MPI)


def mpi_rank() -> int:
    """Rank in the MPI job, 0 outside of one. Source: ``tensorrt_llm/_utils.py``."""
    return int(mpi_comm().Get_rank()) if is_under_mpi() else 0


def mpi_world_size() -> int:
    """Processes of the MPI job, 1 outside of one. Source: ``tensorrt_llm/_utils.py``."""
    return int(mpi_comm().Get_size()) if is_under_mpi() else 1


def record(call: str, rank: int | None = None, **arguments: Any) -> None:
    """Append one line about ``call`` to the log, in a single write, since several processes share it."""
    log = os.environ.get("TRTLLM_STANDIN_LOG")
    if not log:
        return
    line = {"call": call, "arguments": arguments, "rank": mpi_rank() if rank is None else rank, "pid": os.getpid()}
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, json.dumps(line, default=as_json).encode() + b"\n")
    finally:
        os.close(file)


def as_json(value: Any) -> Any:
    """What JSON does not know by itself: enums, paths, tensors, configurations, classes."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "as_dict"):
        return value.as_dict()
    return repr(value)


def build_fault(rank: int) -> None:
    """Take the time, and meet the end, that the environment asks of building ``rank``."""
    time.sleep(float(os.environ.get("TRTLLM_STANDIN_SLEEP", "0")))
    if rank in _ranks("TRTLLM_STANDIN_DIE_RANK"):
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    if rank in _ranks("TRTLLM_STANDIN_FAIL_RANK"):
        for line in ("IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation)",):
            print(f"[TRT-LLM] [E] [TRT] {line}", flush=True)
        print(f"[TRT-LLM] [E] Engine building failed for rank {rank}, please check the error log.", flush=True)
        raise RuntimeError(f"building rank {rank} failed, as the test asked")


def _ranks(name: str) -> set[int]:
    return {int(word) for word in os.environ.get(name, "").split(",") if word.strip()}

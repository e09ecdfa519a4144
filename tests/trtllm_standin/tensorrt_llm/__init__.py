"""A recording stand-in for TensorRT-LLM: real names, signatures, defaults and choices of 1.0, 1.1 and 1.2, and no GPU.

A call with an argument that the version being played does not have fails. It is stricter than the real package in one way: where
that ignores what it does not know (keywords of ``generate``, fields of the pydantic configurations), this raises TypeError.
Importing it prints the version on stdout, as the real package does.
"""

from tensorrt_llm.logger import logger
from tensorrt_llm.play import VERSION, mpi_rank, mpi_world_size

__version__ = VERSION

print(f"[TensorRT-LLM] TensorRT LLM version: {__version__}", flush=True)

__all__ = ["__version__", "logger", "mpi_rank", "mpi_world_size"]

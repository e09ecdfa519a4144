"""One process, one rank: ``trtllm-build`` as TensorRT-LLM wrote it, except that it builds a single rank.

``python -m arctic_trt.engine.tensorrt_llm.worker RANK GPU SHARD ARGUMENTS...`` runs ``tensorrt_llm.commands.build.main`` on the
arguments. That function ends in ``parallel_build``, a loop over all ranks in this process or in a pool that tells nothing of
which rank does what; in its place each rank is its own process, so that ranks have logs, fail alone, resume, and spread over
nodes. Parsing, defaults and the build itself stay TensorRT-LLM's.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from arctic_trt.launch import die_with_parent

DIGEST_FILE = "shard.sha256"
READ_BYTES = 16 << 20
FAILED = 1


def main(words: list[str]) -> None:
    """Build rank ``words[0]`` on GPU ``words[1]`` from the rank file ``words[2]``; the rest is for ``trtllm-build``."""
    die_with_parent(os.getppid())
    rank, gpu, shard, arguments = int(words[0]), int(words[1]), Path(words[2]), words[3:]
    output_dir = Path(arguments[arguments.index("--output_dir") + 1])
    (output_dir / DIGEST_FILE).write_text(digest_of(shard), encoding="ascii")
    build_one_rank(rank, gpu, arguments)


def build_one_rank(rank: int, gpu: int, arguments: list[str]) -> None:
    """Run ``trtllm-build`` for one rank; whatever TensorRT-LLM raises is raised."""
    from tensorrt_llm.commands import build as trtllm_build

    def build_this_rank(
        model_config: Any,
        ckpt_dir: Any,
        build_config: Any,
        output_dir: Any,
        workers: Any = 1,
        log_level: Any = "info",
        model_cls: Any = None,
        **kwargs: Any,
    ) -> None:
        passed = trtllm_build.build_and_save(
            rank, gpu, ckpt_dir, build_config, output_dir, log_level, model_config, model_cls, **kwargs
        )
        if not passed:
            raise RuntimeError(f"TensorRT-LLM did not build rank {rank}.")

    trtllm_build.parallel_build = build_this_rank
    sys.argv = ["trtllm-build", *arguments]
    trtllm_build.main()


def digest_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in order; the build finds the pages in memory afterwards."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])

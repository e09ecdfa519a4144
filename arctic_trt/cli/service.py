"""``arctic-trt service``: the ranks behind a server, which starts them itself. Not for people, and in no help."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from arctic_trt.cli.options import DIRECTORY, device_option, join_job
from arctic_trt.launch import become_mpirun, die_with_parent, find_launch
from arctic_trt.output import Output


@click.command("service", hidden=True)
@click.option("--engine_dir", type=DIRECTORY, required=True, help="Engine directory, as arctic-trt build writes it.")
@click.option("--tokenizer_dir", type=DIRECTORY, help="Directory of tokenizer.json.  [default: --engine_dir]")
@click.option("--socket", type=click.Path(path_type=Path), required=True, help="Unix socket of the server.")
@click.option("--world_size", type=int, default=1, help="Ranks of the engine.  [default: 1]")
@device_option
@click.option("--kv_cache_memory", metavar="SIZE", help="Of the KV cache on a rank, like 2GiB.")
@click.option("--max_tokens_in_paged_kv_cache", type=int, help="Its tokens, at most.")
def command(
    engine_dir: Path,
    tokenizer_dir: Path | None,
    socket: Path,
    world_size: int,
    device: str,
    kv_cache_memory: str | None,
    max_tokens_in_paged_kv_cache: int | None,
) -> None:
    """Serve an engine at a socket until its other end closes: without mpirun, starts the ranks by itself."""
    output = Output()
    output.configure_logging()
    if find_launch(os.environ) is None:
        die_with_parent(os.getppid())
        if world_size > 1:
            become_mpirun(world_size, sys.argv[1:])
    join_job(output)
    from arctic_trt.quantize.memory import parse_size
    from arctic_trt.runtime.kv_budget import KvBudget
    from arctic_trt.runtime.service.ranks import ServiceOptions, run_service

    memory = None if kv_cache_memory is None else parse_size(kv_cache_memory, "--kv_cache_memory")
    budget = KvBudget(memory_bytes=memory, max_tokens=max_tokens_in_paged_kv_cache)
    options = ServiceOptions(engine_dir=engine_dir, socket=socket, tokenizer_dir=tokenizer_dir, kv_budget=budget, device=device)
    run_service(options)

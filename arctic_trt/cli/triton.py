"""``arctic-trt triton``."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arctic_trt.cli.options import DIRECTORY, SectionedCommand, config_option, output_options, refuse_several_processes
from arctic_trt.output import Output, duration

if TYPE_CHECKING:
    from arctic_trt.recipes import TritonRecipe
    from arctic_trt.triton.serve import ServeOptions
    from arctic_trt.triton.server import Endpoints

EPILOG = """\b
Examples:
  arctic-trt triton arctic-engine --tokenizer_dir snowflake-arctic-instruct --model_repo models
  arctic-trt triton arctic-engine --tokenizer_dir snowflake-arctic-instruct --model_repo models --serve

The engine's ranks are started with the server, and again when they die: no mpirun here. SIGTERM and Ctrl-C end the server
once the requests under way are answered; a second Ctrl-C ends it at once."""

SCHEDULING, SERVING = "Scheduling", "Serving"
SECTIONS = {
    **dict.fromkeys(("max_queue_size", "queue_timeout", "priority_levels", "request_timeout"), SCHEDULING),
    **dict.fromkeys(
        (
            *("serve", "host", "http_port", "grpc_port", "metrics_port", "openai_port"),
            *("api_key", "max_request_bytes", "drain_timeout"),
        ),
        SERVING,
    ),
}
LEGACY = "tensorrtllm"
MODEL, PROMPT = "arctic", "The future of AI is"
WAITING_S = 10.0


@click.command(
    "triton",
    cls=SectionedCommand,
    sections=SECTIONS,
    epilog=EPILOG,
    short_help="Write a model repository for Triton Inference Server, and serve it.",
)
@click.argument("engine_dir", type=DIRECTORY)
@click.option("--tokenizer_dir", type=DIRECTORY, help="Directory of tokenizer.json.  [default: ENGINE_DIR]")
@click.option("--model_repo", type=DIRECTORY, help="Model repository to write.  [required]")
@click.option(
    "--backend",
    type=click.Choice(["python", "tensorrtllm"]),
    help="tensorrtllm: for TensorRT-LLM's C++ backend, up to 1.2.  [default: python]",
)
@click.option("--overwrite", is_flag=True, default=None, help="Replace a repository of other content in --model_repo.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Of the engine's ranks, as of run.  [default: auto]")
@click.option("--kv_cache_memory", metavar="SIZE", help="On a rank, like 2GiB.  [default: at most half of what is free]")
@click.option("--max_tokens_in_paged_kv_cache", type=int, help="Tokens of the KV cache, at most.")
@click.option("--max_queue_size", type=int, help="Requests that may wait; more are refused. 0 is no limit.  [default: 0]")
@click.option("--queue_timeout", type=float, metavar="SECONDS", help="Refuse requests that have waited so long.")
@click.option("--priority_levels", type=int, help="Levels that requests may choose from, 1 the most urgent.  [default: none]")
@click.option("--request_timeout", type=float, metavar="SECONDS", help="End requests that have been computed for so long.")
@click.option("--serve", is_flag=True, default=None, help="Start tritonserver and the OpenAI front end, until SIGTERM or Ctrl-C.")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--http_port", type=int, help="Triton's HTTP.  [default: 8000]")
@click.option("--grpc_port", type=int, help="Triton's gRPC.  [default: 8001]")
@click.option("--metrics_port", type=int, help="Metrics for Prometheus.  [default: 8002]")
@click.option("--openai_port", type=int, help="OpenAI's API and the chat page.  [default: 9000]")
@click.option("--api_key", envvar="ARCTIC_TRT_API_KEY", help="Of --openai_port.  [default: ARCTIC_TRT_API_KEY, else none]")
@click.option("--max_request_bytes", type=int, help="Largest body at --openai_port.  [default: 4194304]")
@click.option("--drain_timeout", type=int, metavar="SECONDS", help="For requests under way, once it is to end.  [default: 30]")
@config_option
@output_options
def command(output: Output, engine_dir: Path, config: Path | None, **flags: Any) -> None:
    """Write a Triton model repository around an engine; with --serve, serve it over HTTP, gRPC and OpenAI's API."""
    from arctic_trt.recipes import TritonRecipe, resolve

    refuse_several_processes("triton", "and starts the engine's ranks by itself", "Start it without mpirun.")
    recipe = resolve(TritonRecipe, {**flags, "engine_dir": engine_dir}, config)
    files = _plan_files(recipe)
    if not recipe.serve:
        _write(recipe, files)
        _show_repository(recipe, files, output)
        return
    from arctic_trt.triton.serve import check_serving, serve

    options = _serve_options(recipe, output)
    server = check_serving(options)
    _write(recipe, files)
    serve(server, options, _Watch(output, recipe, options.endpoints))


def _plan_files(recipe: TritonRecipe) -> dict[str, str]:
    from arctic_trt.engine.config import read_engine_config
    from arctic_trt.quantize.memory import parse_size

    if recipe.kv_cache_memory is not None:
        parse_size(recipe.kv_cache_memory, "--kv_cache_memory")  # here rather than when the ranks start
    if recipe.backend == LEGACY:
        from arctic_trt.triton.legacy import LegacyOptions, plan_legacy_repository

        legacy = LegacyOptions(
            engine_dir=recipe.engine_dir,
            tokenizer_dir=recipe.tokenizer,
            max_queue_size=recipe.max_queue_size,
            max_tokens_in_paged_kv_cache=recipe.max_tokens_in_paged_kv_cache,
        )
        return plan_legacy_repository(read_engine_config(recipe.engine_dir), legacy)
    from arctic_trt.triton.repository import RepositoryOptions, plan_repository

    return plan_repository(
        RepositoryOptions(
            engine_dir=recipe.engine_dir,
            tokenizer_dir=recipe.tokenizer,
            max_queue_size=recipe.max_queue_size,
            queue_timeout_s=recipe.queue_timeout,
            priority_levels=recipe.priority_levels or 0,
            request_timeout_s=recipe.request_timeout,
            device=recipe.device,
            kv_cache_memory=recipe.kv_cache_memory,
            max_tokens_in_paged_kv_cache=recipe.max_tokens_in_paged_kv_cache,
        )
    )


def _write(recipe: TritonRecipe, files: dict[str, str]) -> None:
    """Write the repository, unless it is there already: serving twice is no reason for --overwrite."""
    from arctic_trt.triton.repository import holds_repository, write_repository

    if not holds_repository(files, recipe.model_repo):
        write_repository(files, recipe.model_repo, overwrite=recipe.overwrite)


def _show_repository(recipe: TritonRecipe, files: dict[str, str], output: Output) -> None:
    models = sorted({name.partition("/")[0] for name in files})
    output.result({"model_repo": str(recipe.model_repo), "backend": recipe.backend, "models": models, "files": sorted(files)})
    rows = [("model repository", str(recipe.model_repo)), ("models", ", ".join(models)), ("next", _serve_command(recipe))]
    output.table("Written", rows)


def _serve_command(recipe: TritonRecipe) -> str:
    if recipe.backend == LEGACY:
        from arctic_trt.engine.config import read_engine_config
        from arctic_trt.triton.legacy import launch_command

        return launch_command(recipe.model_repo, read_engine_config(recipe.engine_dir).network()[1].world_size)
    tokenizer = ["--tokenizer_dir", str(recipe.tokenizer_dir)] if recipe.tokenizer_dir else []
    words = ["arctic-trt", "triton", str(recipe.engine_dir), *tokenizer, "--model_repo", str(recipe.model_repo), "--serve"]
    return shlex.join(words)


def _serve_options(recipe: TritonRecipe, output: Output) -> ServeOptions:
    from arctic_trt.engine.config import read_engine_config
    from arctic_trt.machine import available_cores
    from arctic_trt.triton.serve import ServeOptions
    from arctic_trt.triton.server import Endpoints

    endpoints = Endpoints(recipe.host, recipe.http_port, recipe.grpc_port, recipe.metrics_port, recipe.openai_port)
    ranks = read_engine_config(recipe.engine_dir).network()[1].world_size
    if ranks > available_cores():
        output.note(f"{ranks} ranks share {available_cores()} cores: text comes slower than on a core a rank.")
    if not endpoints.is_local:
        output.note(f"Whoever reaches {recipe.host} can use Triton's ports: they ask for no key, --api_key or not.")
    gateway = {
        "grpc_url": endpoints.address(recipe.grpc_port),
        "host": recipe.host,
        "port": recipe.openai_port,
        "api_key": recipe.api_key,
        "max_request_bytes": recipe.max_request_bytes,
        "drain_timeout_s": recipe.drain_timeout,
    }
    return ServeOptions(
        model_repo=recipe.model_repo, ranks=ranks, endpoints=endpoints, gateway=gateway, drain_timeout_s=recipe.drain_timeout
    )


class _Watch:
    """Says what is loading, and how to use what has been loaded."""

    def __init__(self, output: Output, recipe: TritonRecipe, endpoints: Endpoints) -> None:
        self._output, self._recipe, self._endpoints = output, recipe, endpoints
        self._loading: dict[str, float] = {}
        self._spoke = time.monotonic()
        output.note("starting tritonserver")

    def model(self, name: str, loaded: bool) -> None:
        now = time.monotonic()
        if loaded:
            self._output.note(f"loaded {name} in {duration(now - self._loading.pop(name, now))}")
        else:
            self._loading[name] = now
        self._spoke = now

    def waiting(self) -> None:
        now = time.monotonic()
        if now - self._spoke > WAITING_S:
            self._output.note(f"still waiting for {', '.join(sorted(self._loading)) or 'the server'}")
            self._spoke = now

    def ready(self) -> None:
        urls = self._endpoints.urls()
        self._output.result({"model_repo": str(self._recipe.model_repo), **urls})
        self._output.table("Serving", list(urls.items()))
        for example in examples(urls, self._recipe.api_key is not None):
            self._output.text(f"\n{example}")
        self._output.text("\nCtrl-C ends it, after the requests under way.")

    def draining(self) -> None:
        self._output.note("finishing the requests under way")


def examples(urls: dict[str, str], key: bool) -> list[str]:
    """Command lines to try, of Triton's HTTP and of OpenAI's; ``key`` is whether the latter asks for one."""
    generate = json.dumps({"text_input": PROMPT, "max_tokens": 20})
    chat = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 20, "stream": True})
    secret = ' -H "Authorization: Bearer $ARCTIC_TRT_API_KEY"' if key else ""
    return [
        f"curl -s {urls['http']}/v2/models/arctic_bls/generate -d {shlex.quote(generate)}",
        f"curl -sN {urls['openai']}/chat/completions{secret} -H 'Content-Type: application/json' -d {shlex.quote(chat)}",
    ]

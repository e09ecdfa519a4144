"""``arctic-trt bench``: ``batch`` and ``online``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arctic_trt.cli.options import DIRECTORY, FILE, device_option, join_job, output_options
from arctic_trt.output import Output

if TYPE_CHECKING:
    from arctic_trt.report.bench.run import Watch
    from arctic_trt.report.bench.session import Session
    from arctic_trt.report.bench.table import Cell

PROGRESS_S = 5.0

EPILOG = """\b
Examples, the two benchmarks of Snowflake's tutorial, on an engine of eight ranks and on a server:
  mpirun -n 8 --allow-run-as-root arctic-trt bench batch --engine_dir arctic-engine
         -n 1,2,4,8 -l 2048 --max_new_tokens 256 --warmup --csv batch.csv --plot batch.png
  arctic-trt bench online --openai_url http://localhost:8000 --model arctic --tokenizer_dir snowflake-arctic-instruct
         -l 2048 --max_new_tokens 256 -qps 0.5,1,2 -c 1024"""


POSITIVE = click.IntRange(min=1)


def numbers(kind: type[int] | type[float]) -> dict[str, Any]:
    """What makes an option take positive numbers separated by commas."""

    def parse(ctx: click.Context, param: click.Parameter, given: str | None) -> tuple[float, ...] | None:
        if given is None:
            return None
        try:
            found = tuple(map(kind, given.split(",")))
        except ValueError:
            found = ()
        if not found or not all(0 < number < math.inf for number in found):
            raise click.BadParameter(f"{given!r} is not a list of positive numbers separated by commas.", ctx, param)
        return found

    return {"callback": parse, "metavar": "N,N,..."}


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What is measured, with which prompts, and where the results go."""
    for option in reversed(
        (
            click.option("--engine_dir", type=DIRECTORY, help="Measure this engine of the torch backend, alone or under mpirun."),
            click.option("--triton_url", metavar="URL", help="Measure Triton's generate_stream at http://HOST:PORT."),
            click.option("--openai_url", metavar="URL", help="Measure the /v1/completions of a server at http://HOST:PORT."),
            click.option("--model", help="Name of the model on the server."),
            click.option("--tokenizer_dir", type=DIRECTORY, help="Of the model; needed for a server, and for prompts as text."),
            click.option("--input_file", type=FILE, help="Prompts, as of run.  [default: random tokens]"),
            click.option(
                "-l",
                "--prompt_length",
                **numbers(int),
                help="Tokens of each prompt; cuts those of a file.  [default: 2048, with --input_file as they are]",
            ),
            click.option(
                "-k",
                "--max_new_tokens",
                type=POSITIVE,
                metavar="N",
                default=256,
                show_default=True,
                help="Tokens of each output.",
            ),
            click.option(
                "-w",
                "--warmup",
                type=click.IntRange(min=0),
                metavar="[N]",
                is_flag=False,
                flag_value=1,
                default=0,
                help="Serve N prompts first that do not count; without a number, one.",
            ),
            click.option(
                "--seed", type=click.IntRange(min=0), metavar="N", default=0, show_default=True, help="Of prompts and arrivals."
            ),
            click.option("--framework", metavar="NAME", help="What the CSV calls it.  [default: arctic-trt, triton or openai]"),
            click.option(
                "-tp", "--tensor_parallel", type=POSITIVE, metavar="N", help="What the CSV says of a server; an engine knows."
            ),
            device_option,
            click.option("--csv", "csv_file", type=FILE, help="Write the tutorial's columns."),
            click.option("--plot", type=FILE, help="Draw throughput against latency, .png or .svg."),
            output_options,
        )
    ):
        command = option(command)
    return command


@click.group("bench", epilog=EPILOG, short_help="Measure latency and throughput of an engine or a server.")
def command() -> None:
    """Measure latency and throughput of an engine, of Triton or of a server of OpenAI's kind."""


@command.command("batch", short_help="Prompts that come all at once.")
@click.option("-n", "--num_queries", **numbers(int), default="1,2,4,8", show_default=True, help="Prompts at once.")
@click.option(
    "--repeat", type=POSITIVE, metavar="N", default=1, show_default=True, help="Measure each N times, report the median."
)
@shared_options
def batch(
    output: Output, num_queries: tuple[int, ...], repeat: int, csv_file: Path | None, plot: Path | None, **flags: Any
) -> None:
    """Time batches: first tokens, prefill, decode, and the share of the memory's bandwidth that decoding uses."""
    session = _plan(output, csv_file, plot, flags)
    from arctic_trt.report.bench.plan import plan_batches
    from arctic_trt.report.bench.plot import draw_batches
    from arctic_trt.report.bench.run import plan_batch_rounds, run_batches, warm_up
    from arctic_trt.report.bench.table import BATCH_HEADER, batch_csv, batch_memory_table, batch_table

    cases = plan_batches(num_queries, session.lengths)
    rounds = plan_batch_rounds(session.workload, cases, max_new_tokens=session.options.max_new_tokens, repeat=repeat)
    with session.open(rounds) as place:
        if place is None:
            return
        warm_up(place.target, session.warmup)
        memory = place.measure_memory()
        result = run_batches(place.target, rounds, memory, _watch(output))
        _write(csv_file, batch_csv(result.rows, session.framework, place.tensor_parallel))
        if plot:
            _draw(plot, draw_batches(result.rows, plot.suffix[1:]))
        output.result({**result.as_dict(), **session.as_dict(place)})
        output.table("Batches", batch_table(result.rows), BATCH_HEADER, always=True)
        if beside := batch_memory_table(result):
            output.table("Memory", beside, always=True)


@command.command("online", short_help="Requests that come at random times.")
@click.option("-qps", "--queries_per_second", **numbers(float), default="0.5,1,2", show_default=True, help="Requests a second.")
@click.option("-c", "--client_num", type=POSITIVE, metavar="N", default=64, show_default=True, help="At once; others wait.")
@click.option("--num_requests", type=POSITIVE, metavar="N", default=100, show_default=True, help="Requests at each rate.")
@shared_options
def online(
    output: Output,
    queries_per_second: tuple[float, ...],
    client_num: int,
    num_requests: int,
    csv_file: Path | None,
    plot: Path | None,
    **flags: Any,
) -> None:
    """Let requests arrive at random (a Poisson process): times to first tokens, between tokens and in all, with percentiles."""
    session = _plan(output, csv_file, plot, flags)
    from arctic_trt.report.bench.plan import plan_rates
    from arctic_trt.report.bench.plot import draw_online
    from arctic_trt.report.bench.run import plan_online_rounds, run_online, warm_up
    from arctic_trt.report.bench.table import ONLINE_HEADER, online_csv, online_memory_table, online_table

    cases = plan_rates(queries_per_second, session.lengths, num_requests)
    options = session.options
    rounds = plan_online_rounds(
        session.workload, cases, max_new_tokens=options.max_new_tokens, concurrency=client_num, seed=options.seed
    )
    with session.open(rounds) as place:
        if place is None:
            return
        warm_up(place.target, session.warmup)
        memory = place.measure_memory()
        result = run_online(place.target, rounds, memory, _watch(output))
        _write(csv_file, online_csv(result.rows, session.framework))
        if plot:
            _draw(plot, draw_online(result.rows, plot.suffix[1:]))
        output.result({**result.as_dict(), "concurrency": client_num, **session.as_dict(place)})
        output.table("Requests at random times", online_table(result.rows), ONLINE_HEADER, always=True)
        if beside := online_memory_table(result):
            output.table("Memory", beside, always=True)


def _plan(output: Output, csv_file: Path | None, plot: Path | None, flags: dict[str, Any]) -> Session:
    """Everything that can be wrong before anything is measured."""
    join_job(output)
    from arctic_trt.report.bench.plot import check_ending
    from arctic_trt.report.bench.session import BenchOptions, Session
    from arctic_trt.runtime.outputs import check_writable

    check_writable("--csv", csv_file)
    check_writable("--plot", plot)
    check_ending(plot)
    return Session(BenchOptions(**flags))


def _watch(output: Output) -> Watch:
    """A line a case, and every few seconds how many of its requests are done."""
    from arctic_trt.report.bench.run import Watch

    said = time.monotonic()

    def on_request(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            output.note(f"  {done} of {total} done")

    return Watch(on_case=lambda case: output.note(f"measuring {case}"), on_request=on_request)


def _write(path: Path | None, lines: Sequence[Sequence[Cell]]) -> None:
    import csv

    from arctic_trt.runtime.outputs import replacing

    if path is not None:
        with replacing(path, "w") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)


def _draw(path: Path, picture: bytes) -> None:
    from arctic_trt.runtime.outputs import replacing

    with replacing(path, "wb") as file:
        file.write(picture)

"""``arctic-trt lm_eval``."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from arctic_trt.errors import ArcticTrtError, RefusedError, UsageError
from arctic_trt.launch import find_launch, is_leader, tie_to_launcher
from arctic_trt.output import Output

EPILOG = """\b
Examples, with an engine of eight ranks:
  mpirun -n 8 --allow-run-as-root arctic-trt lm_eval --model arctic_trt
         --model_args engine_dir=arctic-engine,tokenizer_dir=snowflake-arctic-instruct --tasks hellaswag,wikitext
  arctic-trt lm_eval run --help
  arctic-trt lm_eval ls tasks

--model_args: engine_dir, and where they differ from the engine's own tokenizer_dir, max_length, max_gen_toks, add_bos_token,
prefix_token_id and seed."""

MODEL = "arctic_trt"


@click.command(
    "lm_eval",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=EPILOG,
    short_help="Run EleutherAI's lm-evaluation-harness on an engine, alone or under mpirun.",
)
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED, metavar="ARGUMENTS ...")
def command(arguments: tuple[str, ...]) -> None:
    """Run lm-evaluation-harness, with its own ARGUMENTS and with engines as --model arctic_trt.

    Under mpirun rank 0 runs the harness and alone prints; the other ranks take part in what it asks of the engine.
    """
    tie_to_launcher()
    output, leader = Output(), is_leader()
    if leader:
        output.configure_logging()
    else:
        output.mute()
    program = _harness(leader=leader)
    asked = _parse(program, arguments, leader=leader)
    if asked is None:
        return
    opened = _opened(asked)
    if opened is not None:
        from arctic_trt.runtime.device import plan_harness_device
        from arctic_trt.runtime.open_engine import check_engine, open_engine

        engine_dir, device = opened[0], plan_harness_device(opened[1])
        check_engine(engine_dir)  # on all ranks, before the first one takes its time over data sets
    if leader:
        _lead(program, asked)
    elif opened is not None:
        open_engine(engine_dir, device=device).follow()


def _harness(*, leader: bool) -> Any:
    """The harness's own command line; raises :class:`RefusedError` where it is not installed."""
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging
    except ImportError as error:
        raise RefusedError(
            f"The package lm-eval is not installed, or not the version that this program knows ({error}).",
            "pip install 'arctic-trt[eval]'",
        ) from None
    if leader:
        setup_logging()
    return HarnessCLI()


def _parse(program: Any, arguments: tuple[str, ...], *, leader: bool) -> Namespace | None:
    """What the harness makes of ``arguments``, for which it looks in ``sys.argv``; None if that was to print its help."""
    said, before = io.StringIO(), sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(sys.stdout if leader else io.StringIO()):
            return program.parse_args()  # type: ignore[no-any-return]
    except SystemExit as end:
        if end.code:
            complaint = said.getvalue().strip().rpartition("error: ")[2]
            raise UsageError(f"lm-eval: {complaint}.", "See arctic-trt lm_eval run --help.") from None
        return None
    finally:
        sys.argv = before


def _opened(asked: Namespace) -> tuple[Path, str | None] | None:
    """The engine that the harness is going to open, and the device that it names; None if it opens none of ours."""
    if asked.command != "run":
        return None
    from lm_eval.config.evaluate_config import EvaluatorConfig

    try:
        with _silence():  # it repeats all of it when it runs
            config = EvaluatorConfig.from_cli(asked)
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise UsageError(f"lm-eval: {error}.", "See arctic-trt lm_eval run --help.") from None
    if config.model != MODEL:
        return None
    if "engine_dir" not in config.model_args:
        raise UsageError(f"--model {MODEL} needs an engine.", "Give --model_args engine_dir=DIRECTORY.")
    return Path(str(config.model_args["engine_dir"])), config.device


def _lead(program: Any, asked: Namespace) -> None:
    """Run the harness. After a failure the engine stays open, because the other ranks may be anywhere: the job has to end."""
    from arctic_trt.runtime.harness import ArcticTrtLM

    if find_launch(os.environ) is not None:
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # of its bootstrap: a process that runs MPI must not fork
    try:
        program.execute(asked)
    except SystemExit as end:
        if end.code:
            raise ArcticTrtError(f"lm-eval ended with exit code {end.code}, for the reason that it gave.") from None
    ArcticTrtLM.engines.close()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)

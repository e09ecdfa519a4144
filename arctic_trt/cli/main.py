"""The program ``arctic-trt``: finds the command, runs it, and turns every failure into one sentence and an exit code."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import traceback

import click

from arctic_trt import __version__
from arctic_trt.errors import ArcticTrtError
from arctic_trt.launch import end_job, wait_for_leader

COMMANDS = {
    "quantize": "Quantize a Hugging Face Arctic checkpoint to a TensorRT-LLM checkpoint.",
    "verify": "Check a checkpoint or an engine, by itself and against what it was made of.",
    "eval": "Measure perplexity, and how far a checkpoint is from its original.",
    "build": "Build an engine directory from a TensorRT-LLM checkpoint.",
    "plan": "Forecast sizes, memory, disk, time and GPUs, from config.json alone.",
    "run": "Generate text with an engine, alone or under mpirun.",
    "triton": "Write a model repository for Triton Inference Server, and serve it.",
    "bench": "Measure latency and throughput of an engine or a server.",
    "lm_eval": "Run EleutherAI's lm-evaluation-harness on an engine, alone or under mpirun.",
    "doctor": "Say what this machine has, which steps work on it, and what to do next.",
}

EPILOG = """\b
Exit codes:
  0 done            2 wrong usage or configuration   4 verification failed
  1 failed          3 refused before starting        130 interrupted

Every flag is accepted with underscores and with hyphens."""

INTERRUPTED = 130
HIDDEN = ("service", "gateway")
"""Commands that other commands start."""


class LazyGroup(click.Group):
    """Imports a command's module only when that command is asked for, so that help stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS and cmd_name not in HIDDEN:
            return None
        command: click.Command = importlib.import_module(f"arctic_trt.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def with_underscores(token: str) -> str:
    """Flags are declared with underscores; hyphens mean the same."""
    return token.replace("-", "_")


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": with_underscores, "max_content_width": 110},
)
@click.version_option(__version__, prog_name="arctic-trt")
def cli() -> None:
    """Snowflake Arctic: from its Hugging Face checkpoint to FP8 engines, and tokens out of them."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script; always ends in ``SystemExit``."""
    arguments = sys.argv[1:] if argv is None else argv
    code = run_cli(arguments)
    if code:
        end_job(code)
    sys.exit(code)


def run_cli(arguments: list[str]) -> int:
    """Run one command line and return its exit code; messages go to stderr, from one rank only."""
    try:
        cli.main(arguments, prog_name="arctic-trt", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "arctic-trt"
        return _fail(f"{error.format_message()} See {command} --help.", 2)
    except ArcticTrtError as error:
        return _fail(str(error), error.exit_code, arguments)
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _fail(f"Interrupted. To go on: arctic-trt {shlex.join(arguments)}", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away; nothing is left to tell it
        return 1
    except Exception as error:
        return _fail(f"Unexpected {type(error).__name__}: {error} (-v shows where).", 1, arguments)
    return 0


def _fail(message: str, code: int, arguments: list[str] | None = None) -> int:
    """Report a failure once: in an MPI job the first rank does, unless another is alone with its failure."""
    rank = wait_for_leader()
    if arguments and ({"-v", "--verbose"} & set(arguments)):
        traceback.print_exc()
    whose = "" if rank is None or message.startswith("rank ") else f"rank {rank}: "
    click.echo(f"arctic-trt: error: {whose}{' '.join(message.split())}", err=True)
    return code

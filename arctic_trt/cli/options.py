"""Decorators and types that the commands share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from arctic_trt.errors import RefusedError
from arctic_trt.launch import Launch, find_launch, tie_to_launcher
from arctic_trt.output import Output

Command = TypeVar("Command", bound=Callable[..., Any])

DIRECTORY = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


class Several(click.Option):
    """An option that takes all the words up to the next flag, and may be repeated: ``--input_text "a" "b"``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "multiple": True})

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        for name in self.opts:
            registered = parser._long_opt.get(name) or parser._short_opt.get(name)
            take_one = registered.process

            def process(value: Any, state: Any, take_one: Callable[..., None] = take_one) -> None:
                take_one(value, state)
                while state.rargs and not state.rargs[0].startswith("--") and state.rargs[0] not in parser._short_opt:
                    take_one(state.rargs.pop(0), state)

            registered.process = process


class SectionedCommand(click.Command):
    """A command whose help has sections: ``sections`` maps names of options to titles, the others come first."""

    def __init__(self, *args: Any, sections: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                records.setdefault(self._sections.get(parameter.name or "", "Options"), []).append(record)
        for title, lines in records.items():
            with formatter.section(title):
                formatter.write_dl(lines)


def output_options(command: Command) -> Command:
    """Add ``--json``, ``-q`` and ``-v``; the command receives an ``output`` keyword in their place."""

    def wrapper(*args: Any, json_mode: bool, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        output = Output(json_mode=json_mode, verbosity=int(verbose) - int(quiet))
        output.configure_logging()
        return command(*args, output=output, **kwargs)

    wrapper.__doc__, wrapper.__name__ = command.__doc__, command.__name__
    wrapper.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    decorated: Any = wrapper
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Details, and tracebacks of failures."),
        click.option("-q", "--quiet", is_flag=True, help="Only results and errors."),
        click.option("--json", "json_mode", is_flag=True, help="Print exactly one JSON object on stdout."),
    ):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def format_options(command: Command) -> Command:
    """Add the flags that say what a checkpoint consists of: number formats and parallel sizes."""
    for option in reversed(
        (
            click.option("--qformat", type=click.Choice(["fp8", "full_prec"]), help="Of the linear layers.  [default: fp8]"),
            click.option("--kv_cache_dtype", type=click.Choice(["fp8", "none"]), help="[default: fp8, with full_prec none]"),
            click.option(
                "--exclude_modules",
                metavar="PATTERN",
                multiple=True,
                callback=lambda context, option, given: given or None,
                help="Keep modules in bf16, by TensorRT-LLM's names, like 'transformer.layers.0.*'; repeatable.",
            ),
            click.option("--tp_size", type=int, help="Tensor-parallel ranks.  [default: 8]"),
            click.option("--pp_size", type=int, help="Pipeline stages.  [default: 1]"),
            click.option("--moe_tp_size", type=int, help="Ranks that share an expert's rows.  [default: tp_size / moe_ep_size]"),
            click.option("--moe_ep_size", type=int, help="Ranks that share the experts.  [default: 1]"),
        )
    ):
        command = option(command)
    return command


def join_job(output: Output) -> Launch | None:
    """How this process was started; in an MPI job it is tied to the launcher, and only the first rank speaks."""
    tie_to_launcher()
    launch = find_launch(os.environ)
    output.plain = launch is not None
    if launch and launch.rank:
        output.mute()
    return launch


def refuse_several_processes(command: str, why: str, hint: str) -> None:
    """Refuse mpirun for a ``command`` that starts its own processes: each rank would do all of it."""
    launch = find_launch(os.environ)
    if launch and (launch.world_size or 1) > 1:
        raise RefusedError(f"{command} was started as {launch.world_size} processes, {why}.", hint)


def config_option(command: Command) -> Command:
    """Add ``--config RECIPE.yaml``."""
    return click.option("--config", type=FILE, help="YAML file whose keys are this command's flags; flags win over it.")(command)


def device_option(command: Command) -> Command:
    """Add ``--device``."""
    return click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Torch engines: where to compute; auto takes a GPU a rank where there are as many.",
    )(command)

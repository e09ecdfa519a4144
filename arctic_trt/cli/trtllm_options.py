"""The flags of ``trtllm-build`` as flags of ``arctic-trt build``, made from the recipe that they fill."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from arctic_trt.cli.options import FILE, Command, Several
from arctic_trt.recipes.trtllm_build import ALIASES, REMOVED, trtllm_flags


def trtllm_sections() -> dict[str, str]:
    """The title of the help's section that each flag belongs to."""
    return {name: str(group.__doc__).rstrip(".") for name, group in trtllm_flags().items()}


def trtllm_options(command: Command) -> Command:
    """Add every flag of ``trtllm-build``, and those that older versions had, which say what to do instead."""
    for name, group in reversed(trtllm_flags().items()):
        field = group.model_fields[name]
        names = [f"--{name}", *(f"--{alias}" for alias, of in ALIASES.items() if of == name)]
        command = click.option(*names, name, help=field.description, **_click_type(field.annotation))(command)
    for name, advice in REMOVED.items():
        command = click.option(
            f"--{name}", is_flag=False, flag_value="", hidden=True, expose_value=False, callback=_refusal(name, advice)
        )(command)
    return command


def _click_type(annotation: Any) -> dict[str, Any]:
    """How click reads a value of ``annotation``, which is always optional."""
    [kind] = [kind for kind in get_args(annotation) if kind is not types.NoneType]
    if get_origin(kind) is Literal:
        return {"type": click.Choice(get_args(kind))}
    if get_origin(kind) is tuple:
        return {"cls": Several, "metavar": "TEXT ...", "callback": lambda ctx, parameter, value: value or None}
    if kind is bool:
        return {"is_flag": True, "default": None}
    return {"type": FILE if kind is Path else kind}


def _refusal(name: str, advice: str) -> Any:
    def refuse(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            raise click.UsageError(f"--{name} is not taken here. {advice}", ctx)

    return refuse

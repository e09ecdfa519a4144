"""Command lines of arctic-trt, wherever they are written down, held to the real command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import click

from arctic_trt.cli.main import cli

PROGRAM = "arctic-trt"


def parse(words: Sequence[str]) -> click.Context:
    """The context in which ``arctic-trt WORDS...`` would run; raises :class:`click.UsageError` for what it would refuse."""
    parent = click.Context(cli, info_name=PROGRAM, **cli.context_settings)
    name, *rest = words
    command = cli.get_command(parent, name)
    if command is None:
        raise click.UsageError(f"arctic-trt has no command {name!r}")
    return command.make_context(name, rest, parent=parent)


def after_program(words: Sequence[str]) -> list[str]:
    """What follows ``arctic-trt`` in a command line, whatever launches it."""
    return list(words[words.index(PROGRAM) + 1 :])


def in_text(text: str) -> Iterator[list[str]]:
    """Command lines in the fenced blocks of a page; comments, prompts, continuations and redirections are known."""
    for line in joined_lines(text):
        bare = line.strip().removeprefix("$ ")
        if not re.match(rf"([A-Z_]+=\S+ )*((mpirun|srun|docker|apptainer)\b.* )?{PROGRAM} [a-z-]", bare):
            continue
        words = shlex.split(re.split(r"\s(?:>|\||&&|2>)", bare)[0], comments=True)
        yield after_program(words)


def joined_lines(text: str) -> list[str]:
    """Lines without continuations."""
    return re.sub(r"\\\n\s*", " ", text).splitlines()


def fenced(page: str) -> str:
    """The fenced blocks of a Markdown page."""
    return "\n".join(re.findall(r"^```[^\n]*\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL))


def interpolated(value: Any, environment: dict[str, str]) -> Any:
    """A Compose or Kubernetes value with ``${NAME:-default}`` and ``$(NAME)`` filled in."""
    if isinstance(value, dict):
        return {key: interpolated(item, environment) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item, environment) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: environment.get(found[1]) or found[2], value)
    return re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], value)

"""What a command is asked to do, checked once at the boundary: flags over a YAML file over defaults, unknown keys refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from arctic_trt.errors import UsageError


class Recipe(BaseModel):
    """Base of all recipes: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    removed: ClassVar[Mapping[str, str]] = {}
    """Keys that used to exist, and what to do instead."""


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def resolve(kind: type[AnyRecipe], flags: Mapping[str, Any], config: Path | None = None) -> AnyRecipe:
    """Merge the flags that were given over the YAML file ``config`` over the defaults.

    Raises :class:`UsageError` naming the flag or the key, its value, and what is allowed.
    """
    from_file = read_yaml(config) if config else {}
    given = {name: value for name, value in flags.items() if value is not None}
    unknown = [key for key in from_file if key not in kind.model_fields]
    if unknown:
        known = kind.removed.get(unknown[0]) or _suggest(unknown[0], list(kind.model_fields))
        raise UsageError(f"{config} has the unknown key {unknown[0]!r}.", known)
    try:
        return kind(**{**from_file, **given})
    except ValidationError as error:
        problem = error.errors()[0]
        if not problem["loc"]:
            raise UsageError(f"{problem['msg'].removeprefix('Value error, ')}.") from None
        key = str(problem["loc"][0])
        origin = f"{config} has {key}" if key in from_file and key not in given else f"--{key}"
        if problem["type"] == "missing":
            raise UsageError(f"--{key} is required.") from None
        raise UsageError(f"{origin} {problem['input']!r} is not valid: {_lower(problem['msg'])}.") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from disk; raises :class:`UsageError` when it is absent, malformed or no mapping."""
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist.", "--config takes the path of a YAML recipe.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise UsageError(f"{path} holds a {type(raw).__name__}, expected a mapping of flag names to values.")
    return raw


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word.replace("-", "_"), known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(known)}."


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]

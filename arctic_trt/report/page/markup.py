"""HTML that cannot be unbalanced or unescaped: text becomes markup only by passing through :func:`tag`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

VOID = frozenset({"img", "meta", "source"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: str | Iterable[str], **attributes: str | int) -> Markup:
    """An element; plain strings are escaped, :class:`Markup` is taken as it is. ``class_`` stands for ``class``."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items())
    if name in VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: str | Iterable[str]) -> Markup:
    """Several pieces, one after the other; nested sequences are flattened."""
    return Markup("".join(_escape(child) if isinstance(child, str) else join(*child) for child in children))


def _escape(text: str) -> str:
    return text if isinstance(text, Markup) else html.escape(text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[int] = (), class_: str = "") -> Markup:
    """A table that scrolls in its own box; ``numeric`` columns are aligned on the right."""
    kinds = [{"class_": "n"} if column in numeric else {} for column in range(max(len(header), 2))]
    head = tag("thead", tag("tr", [tag("th", cell, scope="col", **kind) for cell, kind in zip(header, kinds, strict=False)]))
    body = [tag("tr", [tag("td", cell, **kind) for cell, kind in zip(row, kinds, strict=True)]) for row in rows]
    return tag("div", tag("table", head if header else Markup(), tag("tbody", body)), class_=f"scroll {class_}".strip())


def pairs(rows: Iterable[tuple[str, str]]) -> Markup:
    """Names and values, a line each."""
    return tag(
        "div",
        tag("table", tag("tbody", [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in rows])),
        class_="scroll pairs",
    )

"""``report.html``: one file, nothing loaded from anywhere, readable in light and dark, on small screens and on paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from arctic_trt import __version__
from arctic_trt.report.page import sections
from arctic_trt.report.page.canvas import Picture
from arctic_trt.report.page.markup import Markup, tag
from arctic_trt.report.page.records import Records
from arctic_trt.report.page.summary import key_figures
from arctic_trt.report.page.theme import DARK, LIGHT, Theme
from arctic_trt.report.page.wording import title_of

STYLE = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SECTIONS: dict[str, tuple[str, Callable[[Records], sections.Drawn]]] = {
    "quality": ("Quality", sections.quality),
    "verification": ("Verification", sections.verification),
    "noise": ("Quantization noise", sections.noise),
    "calibration": ("Calibration coverage", sections.calibration),
    "scales": ("Activation scales", sections.scales),
    "sensitivity": ("Sensitivity", sections.sensitivity),
    "costs": ("Time and memory", sections.costs),
    "provenance": ("Provenance", sections.provenance),
}


@dataclass(frozen=True, slots=True)
class Page:
    """The whole page, and the pictures in it."""

    html: str
    pictures: tuple[Picture, ...]


def draw_page(records: Records) -> Page:
    """Everything that is known about a checkpoint, on one page."""
    pictures: list[Picture] = []
    body: list[Markup] = []
    for name, (title, make) in SECTIONS.items():
        content, drawn = make(records)
        pictures += drawn
        body.append(tag("section", tag("h2", title), content, id=name))
    main = tag("main", _header(records), body, tag("footer", f"Drawn by arctic-trt {__version__} from the records in report/."))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{records.name}: report"),
        tag("style", Markup(_style())),
    )
    return Page("<!doctype html>\n" + tag("html", head, tag("body", main), lang="en") + "\n", tuple(pictures))


def _style() -> str:
    dark = f"@media screen and (prefers-color-scheme: dark) {{ {_variables(DARK)} }}"
    return "\n".join(("", _variables(LIGHT), dark, STYLE.read_text(encoding="utf-8")))


def _variables(theme: Theme) -> str:
    colours = [f"--{name}: {value};" for name, value in asdict(theme).items() if isinstance(value, str)]
    return f":root {{ {' '.join(colours)} }}"


def _header(records: Records) -> Markup:
    links = [tag("a", title, href=f"#{name}") for name, (title, _) in SECTIONS.items()]
    problems = tag("div", [tag("p", problem) for problem in records.problems], class_="problems", role="note")
    return tag(
        "header",
        tag("h1", records.name),
        tag("p", title_of(records) + "."),
        problems if records.problems else Markup(),
        key_figures(records),
        tag("nav", links),
    )

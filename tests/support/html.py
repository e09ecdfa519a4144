"""What a browser would make of a page, read strictly: every element closed in order, and everything that it would load."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"img", "meta", "source"}
LOADING = {"src", "srcset", "href", "action", "data", "poster", "background"}


class StrictPage(HTMLParser):
    """Parses on construction; raises AssertionError for an element that is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str] = []
        self.by_section: dict[str, str] = {}
        self.text = ""
        self.style = ""
        self._section = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        assert len(given) == len(attrs), f"an attribute twice in {tag}"
        self.loads += [value or "" for name, value in attrs if name in LOADING]
        if tag == "img":
            self.alts.append(given.get("alt") or "")
        if tag == "section":
            self._section = given["id"] or ""
            self.by_section[self._section] = ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open}"
        self.open.pop()
        if tag == "section":
            self._section = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        raise AssertionError(f"<{tag}/> is not HTML")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
            return
        self.text += f"{data} "
        if self._section:
            self.by_section[self._section] += f"{data} "

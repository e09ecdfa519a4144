"""Text becomes markup only by being escaped."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.report.page.markup import Markup, join, pairs, table, tag
from tests.support.html import StrictPage

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=30)


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "<b> & \"'") == "<p>&lt;b&gt; &amp; &quot;&#x27;</p>"
    assert tag("p", tag("b", "x")) == "<p><b>x</b></p>"
    assert tag("p", ["a", [Markup("<i></i>"), "<"]]) == "<p>a<i></i>&lt;</p>"
    assert join("a", ["<"]) == "a&lt;" and isinstance(join(), Markup)


def test_attributes_are_escaped_and_named_as_html_names_them() -> None:
    assert tag("meta", http_equiv='a"b', class_="<c>") == '<meta http-equiv="a&quot;b" class="&lt;c&gt;">'
    assert tag("meta", name="x") == '<meta name="x">', "an attribute may be called name"


def test_a_table_aligns_numbers_and_scrolls() -> None:
    made = table(("a", "b"), [("x", "1"), ("<", "2")], numeric=(1,))
    assert made.startswith('<div class="scroll"><table><thead><tr><th scope="col">a</th><th scope="col" class="n">b</th>')
    assert '<td>&lt;</td><td class="n">2</td>' in made


@given(st.lists(st.tuples(TEXT, TEXT), max_size=4))
def test_whatever_the_text_the_page_stays_balanced_and_says_it(rows: list[tuple[str, str]]) -> None:
    page = StrictPage(join(table(("name", "value"), rows), pairs(rows)))
    assert set(page.tags) <= {"div", "table", "thead", "tbody", "tr", "th", "td"}
    for row in rows:
        assert all(cell in page.text for cell in row)

"""Which experts count as under-covered."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.report.page.coverage import assess_coverage

TABLES = st.integers(1, 9).flatmap(lambda experts: st.lists(st.lists(st.integers(0, 500), min_size=experts, max_size=experts)))


def test_an_expert_without_tokens_and_one_with_few() -> None:
    covered = assess_coverage([[100, 100, 100, 100], [0, 9, 200, 191], [0, 10, 200, 190]])
    assert (covered.without, covered.few) == ([(1, 0), (2, 0)], [(1, 1)]), "a tenth of the mean is enough"
    assert covered.experts == 12 and covered.mean(1) == 100
    assert covered.summary() == "2 of 12 experts saw no token, 1 more saw fewer than a tenth of their layer's mean."
    assert assess_coverage([[1, 2]]).summary() == "All 2 experts saw at least a tenth of their layer's mean."


@given(TABLES)
def test_no_expert_is_counted_twice_or_forgotten(tokens: list[list[int]]) -> None:
    covered = assess_coverage(tokens)
    lacking = covered.without + covered.few
    assert len(set(lacking)) == len(lacking)
    for layer, counts in enumerate(tokens):
        for expert, count in enumerate(counts):
            assert ((layer, expert) in lacking) == (count == 0 or 10 * count * len(counts) < sum(counts))

"""What followers receive is what rank 0 decided."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.runtime.step import END, Chunk, Step, decode_step, encode_step

ints = st.integers(0, 2**31 - 1)
tuples = st.lists(ints, max_size=5).map(tuple)
chunks = st.builds(Chunk, sequence=ints, start=ints, tokens=tuples, blocks=tuples, logits_from=ints)
steps = st.builds(Step, chunks=st.lists(chunks, max_size=4).map(tuple), freed=st.lists(ints, max_size=4).map(tuple))


@given(steps)
def test_a_step_survives_the_wire(step: Step) -> None:
    assert decode_step(encode_step(step)) == step


def test_counts() -> None:
    whole = Chunk(sequence=0, start=0, tokens=(1, 2, 3), blocks=(4, 0), logits_from=2)
    part = Chunk(sequence=1, start=4, tokens=(5, 6), blocks=(), logits_from=2)
    step = Step(chunks=(whole, part))
    assert (step.num_tokens, step.num_logits) == (5, 1)
    assert (END.num_tokens, END.num_logits) == (0, 0)

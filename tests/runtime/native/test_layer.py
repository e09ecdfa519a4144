"""A layer in two calls gives the bits that its single operations give."""

from __future__ import annotations

import pytest

from arctic_trt.runtime.layer import ComposedLayer, plan_shape
from arctic_trt.runtime.native.kernels import NativeKernels
from arctic_trt.runtime.native.layer import CLayer, NativeLayer
from arctic_trt.runtime.network import Network
from arctic_trt.runtime.step import Step
from tests.runtime.conftest import Model
from tests.runtime.test_network import RECIPES, chunk, lead, logits_in_parts, make_worker


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", ["tiny", "unlike"])
def test_two_calls_are_the_single_operations(shape: str, name: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(shape)
    engine_dir = model.engine(name, **RECIPES[name])
    whole, single = make_worker(engine_dir), make_worker(engine_dir)
    assert all(isinstance(layer, NativeLayer) for layer in whole.network.layers)
    compose(single.network)
    tokens = model.prompts(40)[0]
    for size in (40, 7, 1):
        assert logits_in_parts(whole, tokens, size).equal(logits_in_parts(single, tokens, size)), f"in parts of {size}"


def test_more_tokens_than_are_held_at_a_time(tiny: Model) -> None:
    """In two blocks of the C code; with chunks of several sequences across their border."""
    engine_dir = tiny.engine("fp8")
    whole, single = make_worker(engine_dir, blocks=100), make_worker(engine_dir, blocks=100)
    compose(single.network)
    prompts = tiny.prompts(*[240] * 3)
    step = Step(chunks=tuple(chunk(prompt, 0, 240, index) for index, prompt in enumerate(prompts)))
    expected, found = lead(single, step), lead(whole, step)
    assert len(found) == 720 and found.equal(expected)


def compose(network: Network) -> None:
    shape = plan_shape(network.config, network.rank)
    network.layers = [ComposedLayer(NativeKernels(1), weights, shape) for weights in network.weights.layers]


def test_the_structure_has_the_size_that_the_compiler_gives_it() -> None:
    """Pointers and longs of 8 bytes, a float at the end."""
    pointers, projections, longs = 4, 7 * 6, 7
    assert CLayer.eps.offset == 8 * (pointers + projections + longs)

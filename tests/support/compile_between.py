"""Compile what lies between the library's products, for an H100 and at full size; print what came out as JSON."""

from __future__ import annotations

import json

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from arctic_trt.runtime.cuda.triton_between import TritonBetween
from tests.support import compile_for_hopper as hopper
from tests.support.compile_for_hopper import EXPERTS, FFN, HIDDEN, codes, projection

TOKENS = 2048


def main() -> None:
    driver.set_active(hopper.Hopper())
    JITFunction.__getitem__ = hopper.compile_instead
    hopper.tokens = TOKENS
    between = TritonBetween()
    expert_S, share_S = between.choose(torch.empty(TOKENS, EXPERTS), 2, range(EXPERTS))
    order = between.sort(expert_S, 2, EXPERTS)
    between.gather(codes(TOKENS, HIDDEN), order)
    between.gate(torch.empty(2 * TOKENS, 2 * FFN, dtype=torch.bfloat16), projection(HIDDEN, FFN), order)
    between.gate(torch.empty(TOKENS, 2 * 896), projection(HIDDEN, 896), None)
    rows = torch.empty(2 * TOKENS, HIDDEN, dtype=torch.bfloat16)
    between.add(torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16), rows, expert_S, share_S, order)
    print(json.dumps(hopper.found))


if __name__ == "__main__":
    main()

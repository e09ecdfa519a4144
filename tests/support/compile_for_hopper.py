"""Compile every kernel that a step of full-size Arctic launches, for an H100 and without one; print what came out as JSON.

Run it as a program of its own: whether Triton interprets or compiles is decided when a kernel is defined.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from arctic_trt.runtime.cuda import triton_ops
from arctic_trt.runtime.cuda.ops import AttentionRows, NormOutput
from arctic_trt.runtime.kernels import Projection, Tables

HIDDEN, FFN, EXPERTS, HELD, HEADS, SIZE, PAGE = 7168, 608, 128, 4, 7, 128, 32
found: dict[str, dict[str, Any]] = {}


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_instead(self: JITFunction, grid: object) -> Callable[..., None]:
    def launch(*arguments: object, **options: object) -> None:
        kernel = self.warmup(*arguments, grid=grid, **options)
        name = f"{self.__name__} of {tokens}: {len(found)}"
        wgmma = "wgmma.mma_async" in kernel.asm["ptx"]
        found[name] = {"wgmma": wgmma, "spills": spills(kernel.asm["cubin"]), "shared": kernel.metadata.shared}

    return launch


def spills(cubin: bytes) -> bool:
    """Whether registers did not suffice, by what the machine code says that it needs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    (stack,), (local,) = (re.findall(rf"{kind}:(\d+)", said) for kind in ("STACK", "LOCAL"))
    return int(stack) + int(local) > 0


def projection(*shape: int) -> Projection:
    alpha = torch.ones(1) if len(shape) == 2 else torch.ones(shape[0], 1)
    return Projection(torch.empty(shape, dtype=torch.float8_e4m3fn), torch.ones(1), alpha)


def codes(rows: int, length: int) -> Tensor:
    return torch.empty(rows, length, dtype=torch.float8_e4m3fn)


def compile_step(count: int) -> None:
    ops, x = triton_ops.TritonOps(), torch.empty(count, HIDDEN)
    reader, fc, proj = projection(8, HIDDEN), projection(HELD, 2 * FFN, HIDDEN), projection(HELD, HIDDEN, FFN)
    ints = torch.zeros(count, dtype=torch.int32)
    ops.embed(ints, ints, torch.empty(4000, HIDDEN, dtype=torch.bfloat16), 0)
    ops.choose(torch.empty(count, 32000), ints, torch.zeros(count, 5, dtype=torch.float64), ints)
    ops.norm(x, x, [NormOutput(torch.ones(HIDDEN), each) for each in (reader, reader, None)], 1e-5)
    ops.project(codes(count, HIDDEN), projection((HEADS + 2) * SIZE, HIDDEN), torch.float32)
    ops.project(x.bfloat16(), Projection(torch.empty(4000, HIDDEN, dtype=torch.bfloat16)), torch.float32)
    ops.gated(codes(count, HIDDEN), projection(2 * 896, HIDDEN), projection(HIDDEN, 896))
    routed = ops.route(x, torch.empty(EXPERTS, HIDDEN), 2, range(EXPERTS))
    inner = ops.expert_gated(codes(count, HIDDEN), routed, fc, proj)
    ops.combine(x, ops.expert_project(inner, routed, proj), routed)
    pages = torch.empty(4, 2, 1, PAGE, SIZE, dtype=torch.float8_e4m3fn)
    rotary = torch.empty(9, SIZE), torch.empty(9, SIZE)
    q_TNH = ops.rotate_and_store(torch.empty(count, (HEADS + 2) * SIZE), rotary, ints, pages, ints, torch.ones(1))
    decoding = count < 100
    tables = Tables(ints, ints, torch.zeros(count, 128, dtype=torch.int32))
    rows = AttentionRows(tables, ints, ints, ints, 2 if decoding else 9, 8 if decoding else 1)
    ops.attend(q_TNH, pages, rows, torch.ones(1), projection(HIDDEN, 896))


if __name__ == "__main__":
    driver.set_active(Hopper())
    JITFunction.__getitem__ = compile_instead
    plan_blocks = triton_ops.plan_blocks  # nothing was computed, so nothing was routed
    triton_ops.plan_blocks = lambda expert_S, *sizes: plan_blocks(torch.zeros_like(expert_S), *sizes)
    for tokens in (1, 32, 2048):
        compile_step(tokens)
    print(json.dumps(found))

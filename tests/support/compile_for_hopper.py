"""Compile every kernel that a step of full-size Arctic launches, for an H100 and without one; print what came out as JSON.

Run it as a program of its own: whether Triton interprets or compiles is decided when a kernel is defined.
"""

from __future__ import annotations

import json
import math
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
from arctic_trt.runtime.cuda.triton_between import TritonBetween
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


def compile_instead(self: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
    def launch(*arguments: object, **options: object) -> None:
        kernel = self.warmup(*arguments, grid=grid, **options)
        seen = {name.split(" of ")[0] for name in found}
        found[f"{self.__name__} of {tokens}: {len(found)}"] = {
            **resources(kernel.asm["cubin"]),
            "shared": kernel.metadata.shared,
            "threads": 32 * kernel.metadata.num_warps,
            "programs": math.prod(grid),
            "early": kernel.metadata.launch_pdl,
            "ptx": sorted(set(re.findall(r"^\s+(?:@%\w+ )?([a-zA-Z][a-zA-Z0-9_.:]+) ", kernel.asm["ptx"], re.MULTILINE))),
            "machine": machine_code(kernel.asm["cubin"]) if tokens == 1 and self.__name__ not in seen else [],
        }

    return launch


def disassembled(tool: str, cubin: bytes, *words: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *words, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of memory in which it keeps what they do not hold."""
    said = disassembled(knobs.nvidia.cuobjdump.path, cubin, "--dump-resource-usage")
    (stack,), (local,), (registers,) = (re.findall(rf"{kind}:(\d+)", said) for kind in ("STACK", "LOCAL", "REG"))
    return {"registers": int(registers), "spilled": int(stack) + int(local)}


def machine_code(cubin: bytes) -> list[str]:
    """Names of the machine's instructions; to start the disassembler takes longer than to compile."""
    said = disassembled(knobs.nvidia.nvdisasm.path, cubin, "-c")
    return sorted(set(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", said, re.MULTILINE)))


def projection(*shape: int) -> Projection:
    alpha = torch.ones(1) if len(shape) == 2 else torch.ones(shape[0], 1)
    return Projection(torch.empty(shape, dtype=torch.float8_e4m3fn), torch.ones(1), alpha)


def codes(rows: int, length: int) -> Tensor:
    return torch.empty(rows, length, dtype=torch.float8_e4m3fn)


def compile_step(count: int) -> None:
    """What a layer and the end of a network launch, in the order in which they do."""
    ops, x, ints = triton_ops.TritonOps(early=True), torch.empty(count, HIDDEN), torch.zeros(count, dtype=torch.int32)
    reader, fc, proj = projection(8, HIDDEN), projection(HELD, 2 * FFN, HIDDEN), projection(HELD, HIDDEN, FFN)
    ops.embed(ints, ints, torch.empty(4000, HIDDEN, dtype=torch.bfloat16), 0)
    ops.norm(x, x, [NormOutput(torch.ones(HIDDEN), each) for each in (reader, reader, None)], 1e-5)
    routed = ops.route(x, torch.empty(EXPERTS, HIDDEN), 2, range(EXPERTS))
    slots_SD = ops.expert_project(ops.expert_gated(codes(count, HIDDEN), routed, fc, proj), routed, proj)
    qkv = ops.project(codes(count, HIDDEN), projection((HEADS + 2) * SIZE, HIDDEN), torch.float32)
    pages, rotary = torch.empty(4, 2, 1, PAGE, SIZE, dtype=torch.float8_e4m3fn), (torch.empty(9, SIZE), torch.empty(9, SIZE))
    tables = Tables(ints, ints, torch.zeros(count, 128, dtype=torch.int32))
    single = count < 100
    splits = max(1, min(16, 256 // count))
    rows = AttentionRows(tables, ints, ints, ints, 1 if single else 9, splits, single)
    dense = projection(HIDDEN, 896)
    ops.project(ops.attend(qkv, rotary, ints, pages, ints, rows, torch.ones(1), dense), dense, torch.float32)
    residual = ops.gated(codes(count, HIDDEN), projection(2 * 896, HIDDEN), dense)
    ops.project_and_combine(residual, dense, slots_SD, routed, torch.float32)
    ops.project(x.bfloat16(), Projection(torch.empty(4000, HIDDEN, dtype=torch.bfloat16)), torch.float32)
    ops.choose(torch.empty(count, 32000), ints, torch.zeros(count, 5, dtype=torch.float64), ints)


def compile_between(count: int) -> None:
    """What lies between the library's products."""
    between = TritonBetween()
    expert_S, share_S = between.choose(torch.empty(count, EXPERTS), 2, range(EXPERTS))
    order = between.sort(expert_S, 2, EXPERTS)
    between.gather(codes(count, HIDDEN), order)
    between.gate(torch.empty(2 * count, 2 * FFN, dtype=torch.bfloat16), projection(HIDDEN, FFN), order)
    between.gate(torch.empty(count, 2 * 896), projection(HIDDEN, 896), None)
    rows = torch.empty(2 * count, HIDDEN, dtype=torch.bfloat16)
    between.add(torch.empty(count, HIDDEN, dtype=torch.bfloat16), rows, expert_S, share_S, order)


if __name__ == "__main__":
    driver.set_active(Hopper())
    JITFunction.__getitem__ = compile_instead
    plan_blocks = triton_ops.plan_blocks  # nothing was computed, so nothing was routed
    triton_ops.plan_blocks = lambda expert_S, *sizes: plan_blocks(torch.zeros_like(expert_S), *sizes)
    for tokens in (1, 32, 2048):
        compile_step(tokens)
    compile_between(tokens)
    tokens = 8
    triton_ops.TritonOps().route(torch.empty(tokens, HIDDEN), torch.empty(EXPERTS, HIDDEN), 2, range(EXPERTS))
    print(json.dumps(found))

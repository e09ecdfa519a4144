"""The kernels of the full-size model compile for the GPUs that they are meant for, with or without one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from arctic_trt.runtime.cuda.tiles import PROCESSORS
from tests.support.engines import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton for this machine")
SHARED_BYTES, REGISTERS, IN_FLIGHT = 227 << 10, 64 << 10, 25 << 10
"""Of a multiprocessor of an H100: memory that its programs share, registers, and bytes that it should have asked for."""
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found() -> Found:
    """What the compiler made of each launch of a layer of steps of 1, 32 and 2,048 tokens, and of a router's of 8."""
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "tests.support.compile_for_hopper"]
    done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels: Found = json.loads(done.stdout.splitlines()[-1])
    return kernels


def of(found: Found, *beginnings: str) -> list[dict[str, Any]]:
    return [each for name, each in found.items() if name.startswith(beginnings)]


def test_every_kernel_fits_without_spilling(found: Found) -> None:
    names = {name.split(" of ")[0] for name in found}
    assert names == {
        *("embed_kernel", "choose_token_kernel"),
        *("norm_kernel", "skinny_kernel", "project_kernel", "combine_kernel"),
        *("route_kernel", "plan_kernel", "rotate_and_store_kernel", "attend_kernel"),
        *("choose_kernel", "count_kernel", "place_kernel", "gather_kernel", "gate_kernel", "add_kernel"),
    }
    for name, each in found.items():
        assert each["spilled"] == 0 and each["shared"] <= SHARED_BYTES, name
        assert each["registers"] * each["threads"] <= REGISTERS, name


def test_large_products_use_the_tensor_cores_of_warp_groups(found: Found) -> None:
    products = of(found, "project_kernel of 2048", "attend_kernel of 2048")
    assert len(products) == 8
    assert sum(any(name.startswith("wgmma.mma_async") for name in each["ptx"]) for each in products) >= 5


def test_rows_between_products_are_read_16_bytes_at_once(found: Found) -> None:
    rows = of(found, "gather_kernel", "gate_kernel", "add_kernel")
    assert len(rows) == 4
    for each in rows:
        assert any(re.match(r"ld\.global.*\.(v4\.b32|v2\.b64)", name) for name in each["ptx"]), each["ptx"]


def test_products_of_few_rows_read_16_bytes_at_once_and_multiply_exact_values(found: Found) -> None:
    products = of(found, "skinny_kernel of")
    assert len(products) == 9  # seven of one token, two of experts of 32
    for each in products:
        (product,) = {name for name in each["ptx"] if name.startswith(("mma.", "wgmma."))}
        assert product.endswith((".f32.f16.f16.f32", ".f32.bf16.bf16.f32"))  # e4m3 codes are float16 numbers
        assert {name for name in each["ptx"] if name.startswith("cp.async.c")} == {"cp.async.cg.shared.global"}  # 16 bytes
        assert each["programs"] >= PROCESSORS
    machine = set(products[0]["machine"])
    assert {"LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "HMMA.16816.F32"} <= machine


def test_programs_that_fit_into_a_multiprocessor_ask_for_enough(found: Found) -> None:
    for each in of(found, "skinny_kernel of 1:"):
        fit = min((SHARED_BYTES // (each["shared"] + 1024)), REGISTERS // (each["registers"] * each["threads"]))
        there = min(fit, each["programs"] / PROCESSORS)
        assert fit >= 3 and there * each["shared"] / 2 >= IN_FLIGHT  # weights are at least half of what is in shared memory


def test_launches_begin_early_but_where_streams_part_or_meet(found: Found) -> None:
    one = {name: each for name, each in found.items() if " of 1: " in name}
    late = [name.split(" of ")[0] for name, each in one.items() if not each["early"]]
    assert late == ["embed_kernel", "route_kernel", "skinny_kernel", "choose_token_kernel"]
    for name, each in one.items():
        for word in ("griddepcontrol.wait", "griddepcontrol.launch_dependents"):
            assert (word in each["ptx"]) == each["early"], name
    prefetched = [name for name, each in one.items() if "cp.async.bulk.prefetch.L2.global" in each["ptx"]]
    assert len(prefetched) == 4  # QKV, output projection, residual fc, lm_head
    assert any(name.startswith("prefetch") for name in of(found, "attend_kernel of 1:")[0]["ptx"])


def test_the_last_program_sees_what_the_others_stored(found: Found) -> None:
    for each in of(found, "route_kernel of 1:", "attend_kernel of 1:"):
        assert {"MEMBAR.ALL.GPU", "ATOMG.E.ADD.STRONG.GPU", "CCTL.IVALL"} <= set(each["machine"])

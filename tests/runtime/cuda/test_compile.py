"""The kernels of the full-size model compile for the GPUs that they are meant for, with or without one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.support.engines import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton for this machine")
SHARED_LIMIT = 227 << 10
"""Bytes of shared memory that a program can have on an H100."""


def test_kernels_compile_and_use_the_tensor_cores() -> None:
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "tests.support.compile_for_hopper"]
    done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    names = {name.split(" of ")[0] for name in found}
    assert names == {
        *("norm_kernel", "project_kernel", "combine_kernel", "logits_kernel", "route_kernel"),
        *("embed_kernel", "choose_kernel"),
        *("rotate_and_store_kernel", "attend_kernel", "merge_kernel"),
    }
    assert all(each["shared"] <= SHARED_LIMIT and not each["spills"] for each in found.values())
    products = {
        name: each for name, each in found.items() if name.startswith(("project_kernel of 2048", "attend_kernel of 2048"))
    }
    assert len(products) == 6 and sum(each["wgmma"] for each in products.values()) >= 4

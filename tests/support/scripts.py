"""Programs of scripts/ as modules, so that their parts can be tested."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType

from tests.support.engines import ROOT


def load_script(name: str) -> ModuleType:
    """``scripts/name``, which need not end in .py; what it imports from its own directory is found."""
    if str(ROOT / "scripts") not in sys.path:
        sys.path.insert(0, str(ROOT / "scripts"))
    if name in sys.modules:
        return sys.modules[name]
    path = next(path for path in (ROOT / "scripts" / name, ROOT / "scripts" / f"{name}.py") if path.exists())
    loader = SourceFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))  # type: ignore[arg-type]
    sys.modules[name] = module
    loader.exec_module(module)
    return module

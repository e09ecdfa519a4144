"""Rules of the code's shape that no other tool checks: who may import whom, who may speak, and how long things may grow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "arctic_trt"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))

EVERYONE = {"errors", "__version__"}
ALLOWED = {
    "cli": {"recipes", "output", "quantize", "engine", "runtime", "triton", "report", "checkpoint", "model", "launch", "machine"},
    "__main__": {"cli"},
    "quantize": {"recipes", "checkpoint", "model", "launch", "machine"},
    "engine": {"recipes", "checkpoint", "model", "launch", "machine"},
    "runtime": {"recipes", "checkpoint", "model", "engine", "quantize.fp8", "launch", "machine"},
    "triton": {"recipes", "checkpoint", "model", "engine", "runtime", "launch", "machine"},
    "report": {
        *("recipes", "checkpoint", "model", "engine", "runtime", "quantize", "launch", "machine"),
        *("output.gigabytes", "output.duration"),
    },
    "checkpoint": {"model"},
    "model": set(),
    "recipes": set(),
    "launch": {"machine"},
    "machine": set(),
    "output": set(),
    "errors": set(),
    "__init__": set(),
}
LAZY = {
    *("tensorrt_llm", "tensorrt", "modelopt", "transformers", "matplotlib", "mpi4py", "numba", "datasets", "lm_eval", "tqdm"),
    *("fastapi", "starlette", "uvicorn", "tritonclient", "grpc", "triton"),
}
CUDA_KERNELS = ("attention", "between", "choose", "common", "norm", "project", "route", "skinny")
LAZY_MODULES = {
    "quantize/modelopt.py": "arctic_trt.quantize.modelopt",
    "runtime/harness.py": "arctic_trt.runtime.harness",
    "triton/openai/app.py": "arctic_trt.triton.openai.app",
    "runtime/cuda/multiply.py": "arctic_trt.runtime.cuda.multiply",
    "runtime/cuda/triton_ops.py": "arctic_trt.runtime.cuda.triton_ops",
    "runtime/cuda/triton_between.py": "arctic_trt.runtime.cuda.triton_between",
    **{f"runtime/cuda/kernels/{name}.py": f"arctic_trt.runtime.cuda.kernels.{name}" for name in CUDA_KERNELS},
}
"""Modules that import a heavy library at their top, and are therefore themselves imported inside a function only."""
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def where(path: Path, node: ast.stmt | ast.expr) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{node.lineno}"


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node: ast.AST) -> list[str]:
    """Absolute dotted names that an import statement names; ``from a import b`` counts as ``a.b``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that are executed on import, in classes and conditions too, except below ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from outside_functions(child)


def names_called(path: Path) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def may_import(importer: str, name: str) -> bool:
    parts = name.split(".")[1:]
    return bool(parts) and (parts[0] == importer or not {parts[0], ".".join(parts[:2])}.isdisjoint(ALLOWED[importer] | EVERYONE))


def test_every_room_is_known() -> None:
    assert {room(path) for path in FILES} <= ALLOWED.keys()


def test_dependencies_point_one_way() -> None:
    wrong = [
        f"{where(path, node)} imports {name}"
        for path in FILES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported(node)
        if name.split(".")[0] == "arctic_trt" and not may_import(room(path), name)
    ]
    assert not wrong


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    wrong = [
        f"{where(path, node)} imports {name} at the top"
        for path in FILES
        for node in outside_functions(parse(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported(node)
        if str(path.relative_to(PACKAGE)) not in LAZY_MODULES
        and (name.split(".")[0] in LAZY or any(f"{name}.".startswith(f"{module}.") for module in LAZY_MODULES.values()))
    ]
    assert not wrong


def test_only_its_backend_imports_tensorrt_llm() -> None:
    wrong = [
        where(path, node)
        for path in FILES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported(node)
        if name.split(".")[0] in ("tensorrt_llm", "tensorrt") and (PACKAGE / "engine" / "tensorrt_llm") not in path.parents
    ]
    assert not wrong


@pytest.mark.parametrize("name", ["print", "logging.basicConfig", "sys.stdout.write", "sys.stderr.write", "warnings.warn"])
def test_only_the_command_line_speaks(name: str) -> None:
    files = [path for path in FILES if room(path) not in ("cli", "output")]
    assert not [where(path, call) for path in files for call, called in names_called(path) if called == name]


def test_only_the_command_line_configures_logging_or_knows_click_and_rich() -> None:
    files = [path for path in FILES if room(path) not in ("cli", "output")]
    handlers = [where(path, call) for path in files for call, called in names_called(path) if called.endswith(".addHandler")]
    terminals = [
        where(path, node)
        for path in files
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported(node)
        if name.split(".")[0] in ("click", "rich", "argparse")
    ]
    assert not handlers + terminals


def test_no_function_is_long() -> None:
    lengths = {
        where(path, node): (node.end_lineno or 0) - node.lineno + 1
        for path in FILES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {place: lines for place, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


@pytest.mark.parametrize(
    ("importer", "name", "allowed"),
    [
        ("cli", "arctic_trt.quantize.pipeline.run", True),
        ("quantize", "arctic_trt.checkpoint.hf", True),
        ("quantize", "arctic_trt.__version__", True),
        ("runtime", "arctic_trt.quantize.fp8.dequantize", True),
        ("runtime", "arctic_trt.quantize.fp8", True),
        ("runtime", "arctic_trt.quantize.pipeline", False),
        ("quantize", "arctic_trt.engine", False),
        ("engine", "arctic_trt.output.Output", False),
        ("report", "arctic_trt.output.gigabytes", True),
        ("report", "arctic_trt.output.Output", False),
        ("checkpoint", "arctic_trt.quantize", False),
        ("model", "arctic_trt.checkpoint", False),
        ("model", "arctic_trt", False),
    ],
)
def test_the_rule_itself(importer: str, name: str, allowed: bool) -> None:
    assert may_import(importer, name) is allowed

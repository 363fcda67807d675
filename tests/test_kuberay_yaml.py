"""cluster/kuberay.yaml as a file: KubeRay's schema, and what a run needs of its pods."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from cluster.cli import parse
from cluster.config.file import load_config
from cluster.config.placement import PART_LABEL
from tests.page import commands

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "cluster/kuberay.yaml").read_text(encoding="utf-8")
DOCUMENTS = {document["kind"]: document for document in yaml.safe_load_all(TEXT)}


def closed(required: str = "", **properties: Any) -> dict[str, Any]:
    """An object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "required": required.split(),
    }


# What the file uses of the published definitions of KubeRay (ray.io/v1) and of Kubernetes, with
# types and required keys as they have them.
STRING, WHOLE = {"type": "string"}, {"type": "integer", "minimum": 0}
STRINGS = {"type": "object", "additionalProperties": STRING}
QUANTITY = {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)?([KMGTPE]i|[mkMGTPE])?$"}
RESOURCES = {"type": "object", "additionalProperties": QUANTITY}
CLAIM = closed("claimName", claimName=STRING)
CONTAINER = closed(
    "name",
    name={"type": "string", "pattern": "^[a-z0-9-]{1,63}$"},
    image=STRING,
    env={"type": "array", "items": closed("name", name=STRING, value=STRING)},
    resources=closed(requests=RESOURCES, limits=RESOURCES),
    volumeMounts={
        "type": "array",
        "items": closed("mountPath name", name=STRING, mountPath=STRING),
    },
)
POD = closed(
    "containers",
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
    terminationGracePeriodSeconds=WHOLE,
    securityContext=closed(fsGroup=WHOLE),
    containers={"type": "array", "items": CONTAINER, "minItems": 1},
    volumes={"type": "array", "items": closed("name", name=STRING, persistentVolumeClaim=CLAIM)},
)
TEMPLATE = closed("", spec=POD)
HEAD = closed(
    "rayStartParams template",
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
    rayStartParams=STRINGS,
    template=TEMPLATE,
)
WORKERS = closed(
    "groupName maxReplicas minReplicas rayStartParams template",
    groupName=STRING,
    labels=STRINGS,
    minReplicas=WHOLE,
    maxReplicas=WHOLE,
    rayStartParams=STRINGS,
    template=TEMPLATE,
)
SPECS = {
    ("v1", "PersistentVolumeClaim"): closed(
        accessModes={"type": "array", "items": {"enum": ["ReadWriteOnce", "ReadWriteMany"]}},
        resources=closed(requests=RESOURCES),
    ),
    ("ray.io/v1", "RayCluster"): closed(
        "headGroupSpec",
        rayVersion=STRING,
        authOptions=closed(mode={"enum": ["disabled", "token"]}),
        enableInTreeAutoscaling={"type": "boolean"},
        autoscalerOptions=closed(idleTimeoutSeconds=WHOLE),
        headGroupSpec=HEAD,
        workerGroupSpecs={"type": "array", "items": WORKERS},
    ),
    # Neither a cluster of its own nor what only such a one may have: KubeRay refuses both.
    ("ray.io/v1", "RayJob"): closed(clusterSelector=STRINGS, entrypoint=STRING),
}


def check(document: dict[str, Any]) -> None:
    spec = SPECS[document["apiVersion"], document["kind"]]
    name = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
    whole = closed(
        "", apiVersion=STRING, kind=STRING, metadata=closed("name", name=name), spec=spec
    )
    Draft202012Validator(whole).validate(document)


def pods() -> list[dict[str, Any]]:
    spec = DOCUMENTS["RayCluster"]["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_the_file_as_shipped_fits_the_schema(kind: str) -> None:
    check(DOCUMENTS[kind])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("minReplicas:", "minReplica:"),
        ('num-cpus: "0"', "num-cpus: 0"),
        ('value: "120"', "value: 120"),
        ("mode: token", "mode: tokens"),
        ("entrypoint:", "entryPoint:"),
        ("200Gi", "200 GB"),
    ],
)
def test_a_mistake_would_be_noticed(old: str, new: str) -> None:
    assert old in TEXT
    with pytest.raises(ValidationError):
        for document in yaml.safe_load_all(TEXT.replace(old, new)):
            check(document)


def test_every_pod_has_the_folder_of_runs_and_time_for_an_orderly_end() -> None:
    claim = DOCUMENTS["PersistentVolumeClaim"]["metadata"]["name"]
    for pod in pods():
        (container,) = pod["containers"]
        (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
        assert volume["persistentVolumeClaim"] == {"claimName": claim}
        assert mount["name"] == volume["name"]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert environment["AMORTIZE_RUNS"].startswith(mount["mountPath"])
        # Ray lets a job end in this time; the pod must not go before.
        if pod is pods()[0]:
            assert (
                int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) < pod["terminationGracePeriodSeconds"]
            )


def test_a_gpu_that_is_asked_for_is_also_the_limit() -> None:
    asked = [pod["containers"][0]["resources"] for pod in pods()]
    gpus = [
        (one["requests"].get("nvidia.com/gpu"), one["limits"].get("nvidia.com/gpu"))
        for one in asked
    ]
    assert gpus == [(None, None), *[("1", "1")] * 3]


def test_each_part_of_a_run_has_nodes_of_its_own() -> None:
    groups = DOCUMENTS["RayCluster"]["spec"]["workerGroupSpecs"]
    assert [group["labels"] for group in groups] == [
        {PART_LABEL: part} for part in ("actor", "reward", "learner")
    ]


def test_the_cluster_has_the_pinned_ray_and_asks_for_its_token() -> None:
    spec = DOCUMENTS["RayCluster"]["spec"]
    assert f"ray=={spec['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    assert spec["authOptions"] == {"mode": "token"}
    image = next(
        line for line in (ROOT / "docs/cluster.md").read_text().splitlines() if "FROM" in line
    )
    assert f"rayproject/ray:{spec['rayVersion']}-" in image


def test_the_job_runs_on_the_cluster_and_its_command_is_one() -> None:
    job = DOCUMENTS["RayJob"]["spec"]
    assert job["clusterSelector"] == {"ray.io/cluster": DOCUMENTS["RayCluster"]["metadata"]["name"]}
    program, *arguments = job["entrypoint"].split()
    verb, parsed = parse(arguments)
    assert (program, verb) == ("amortize", "train")
    config = load_config(parsed.config, parsed.overrides)
    cluster = config.cluster
    claims = (cluster.actor_placement, cluster.reward_placement, cluster.learner_placement)
    assert [claim.gpus for claim in claims] == [1, 1, 1] and config.learner.ranks == 1
    assert parsed.run == DOCUMENTS["RayJob"]["metadata"]["name"]


def test_the_page_uses_the_names_of_the_file() -> None:
    lines = [line for line in commands("docs/cluster.md") if "kubectl" in line]
    assert any("cluster/kuberay.yaml" in line for line in lines)
    for line in lines:
        for kind, name in re.findall(r"\b(raycluster|rayjob|secret|service)/(\S+)", line):
            service = f"{DOCUMENTS['RayCluster']['metadata']['name']}-head-svc"
            known = {"rayjob": ("first", "first-again"), "service": (service,)}
            assert name in known.get(kind, ("amortize",)), line

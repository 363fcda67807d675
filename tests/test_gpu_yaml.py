"""The cluster on AWS: what Ray's own launcher and autoscaler make of cluster/gpu.yaml.

Ray's code runs up to the requests that would start machines and the commands that would set them
up. AWS is played by moto; the commands are recorded instead of sent over SSH.
"""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private import commands
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler.v2.instance_manager.config import FileConfigReader
from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter
from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
from ray.core.generated.instance_manager_pb2 import Instance

from tests.page import command

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "cluster" / "gpu.yaml"
LAUNCH_TIMEOUT_S = 60.0
IMAGE = "ami-0123456789abcdef0"
WORKERS = {"actor": "g6.2xlarge", "reward": "g6.12xlarge", "learner": "g6e.2xlarge"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Recorder:
    """In the place of `subprocess` in Ray's command runner: keeps commands and what is copied."""

    DEVNULL = subprocess.DEVNULL

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.copied: dict[str, str] = {}

    def check_call(self, command: list[str], **_: Any) -> int:
        if command[0] == "rsync":
            source, target = command[-2], command[-1].partition(":")[2]
            self.copied[target] = Path(source).expanduser().read_text()
        else:
            self.commands.append(command[-1])
        return 0

    def position(self, text: str) -> int:
        """Of the first command with `text` in it."""
        found = [number for number, command in enumerate(self.commands) if text in command]
        assert found, f"no command has {text!r}: {self.commands}"
        return found[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home of somebody who has made a token and entered an image."""
    folder = tmp_path_factory.mktemp("home")
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text("the token")
    (folder / ".cache/huggingface").mkdir(parents=True)
    (folder / ".cache/huggingface/token").write_text("the token of the hub")
    (folder / "cluster").mkdir()
    shutil.copy(FILE, folder / "cluster")
    enter_image = f"image={IMAGE}; {command('docs/cluster.md', 'sed -i')}"
    subprocess.run(["bash", "-c", enter_image], cwd=folder, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("TMPDIR", str(folder))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            patch.setenv(name, "us-west-2")
        patch.chdir(ROOT)  # file_mounts are relative to the project
        with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
            # Ray's AWS code may be imported only where boto3 may; it waits 15 s for IAM, twice.
            from ray.autoscaler._private.aws import config as aws_config

            patch.setattr(aws_config, "time", SimpleNamespace(sleep=lambda seconds: None))
            yield folder


@pytest.fixture(scope="module")
def head(home: Path) -> Recorder:
    """What `ray up cluster/gpu.yaml` does to the head."""
    recorder = Recorder()
    file = home / "cluster" / "gpu.yaml"
    config = yaml.safe_load(file.read_text())
    resolved = commands._bootstrap_config(config, no_config_cache=True)
    commands.get_or_create_head_node(
        resolved, str(file), False, False, True, None, _runner=recorder
    )
    return recorder


@pytest.fixture(scope="module")
def on_head(head: Recorder, home: Path) -> FileConfigReader:
    """The configuration that the head's autoscaler reads."""
    for path, content in head.copied.items():  # from here on, this home is the head's
        target = Path(path).expanduser()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
    return FileConfigReader(str(home / "ray_bootstrap_config.yaml"))


@pytest.fixture(scope="module")
def launched(on_head: FileConfigReader) -> dict[str, dict[str, Any]]:
    """One machine of each type as the head's autoscaler starts them, by type; the head too."""
    config = on_head.get_cached_autoscaling_config()
    provider = _get_node_provider(config.get_config("provider"), config.get_config("cluster_name"))
    adapter = NodeProviderAdapter(provider, on_head)
    adapter.launch(dict.fromkeys(WORKERS, 1), request_id="test")
    deadline = time.monotonic() + LAUNCH_TIMEOUT_S
    while len(instances()) < 1 + len(WORKERS):
        assert not (errors := adapter.poll_errors()), errors
        assert time.monotonic() < deadline, f"launched only {instances()}"
        time.sleep(0.1)
    return {tags(one)["ray-user-node-type"]: one for one in instances()}


def instances() -> list[dict[str, Any]]:
    ec2 = boto3.client("ec2", region_name="us-west-2")
    return [
        one
        for reservation in ec2.describe_instances()["Reservations"]
        for one in reservation["Instances"]
    ]


def tags(instance: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in instance["Tags"]}


def user_data(instance: dict[str, Any]) -> dict[str, Any]:
    ec2 = boto3.client("ec2", region_name="us-west-2")
    answer = ec2.describe_instance_attribute(
        InstanceId=instance["InstanceId"], Attribute="userData"
    )
    text = base64.b64decode(answer["UserData"]["Value"]).decode()
    assert text.startswith("#cloud-config\n")
    return dict(yaml.safe_load(text))


def test_each_type_of_machine_is_launched_with_its_size_and_image(
    launched: dict[str, dict[str, Any]],
) -> None:
    sizes = {name: one["InstanceType"] for name, one in launched.items()}
    assert sizes == {"head": "m7i.2xlarge", **WORKERS}
    assert {one["ImageId"] for one in launched.values()} == {IMAGE}


def test_only_what_loses_nothing_is_on_spot(launched: dict[str, dict[str, Any]]) -> None:
    on_spot = {name for name, one in launched.items() if one.get("InstanceLifecycle") == "spot"}
    assert on_spot == {"actor", "reward"}


def test_machines_carry_the_tags_by_which_ray_finds_them(
    launched: dict[str, dict[str, Any]],
) -> None:
    for name, one in launched.items():
        kind = "head" if name == "head" else "worker"
        assert tags(one)["ray-cluster-name"] == "amortize"
        assert tags(one)["ray-node-type"] == kind
        assert tags(one)["Name"] == f"ray-amortize-{kind}"


def test_only_the_head_may_start_machines(launched: dict[str, dict[str, Any]]) -> None:
    with_role = {name for name, one in launched.items() if "IamInstanceProfile" in one}
    assert with_role == {"head"}
    profile = launched["head"]["IamInstanceProfile"]["Arn"]
    assert profile.endswith("instance-profile/ray-autoscaler-v1")
    iam = boto3.client("iam")
    policies = iam.list_attached_role_policies(RoleName="ray-autoscaler-v1")["AttachedPolicies"]
    assert "AmazonEC2FullAccess" in {policy["PolicyName"] for policy in policies}


def test_from_outside_only_ssh_gets_in(launched: dict[str, dict[str, Any]]) -> None:
    groups = {group["GroupId"] for one in launched.values() for group in one["SecurityGroups"]}
    assert len(groups) == 1
    ec2 = boto3.client("ec2", region_name="us-west-2")
    (group,) = ec2.describe_security_groups(GroupIds=list(groups))["SecurityGroups"]
    assert group["GroupName"] == "amortize"
    from_anywhere = [rule for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in from_anywhere] == [(22, 22)]
    among_themselves = [rule for rule in group["IpPermissions"] if rule["UserIdGroupPairs"]]
    assert [rule["IpProtocol"] for rule in among_themselves] == ["-1"]
    sources = {pair["GroupId"] for rule in among_themselves for pair in rule["UserIdGroupPairs"]}
    assert sources == groups


def test_machines_install_packages_as_they_boot_and_the_head_exports_the_runs(
    launched: dict[str, dict[str, Any]],
) -> None:
    head = user_data(launched["head"])
    assert "nfs-kernel-server" in head["packages"]
    (exports,) = head["write_files"]
    assert exports["content"].startswith("/srv/amortize *(rw,sync")
    assert ["exportfs", "-ra"] in head["runcmd"]
    for name in WORKERS:
        assert user_data(launched[name])["packages"] == ["python3-venv", "nfs-common"]


def test_a_cluster_without_a_job_is_its_head_alone(on_head: FileConfigReader) -> None:
    config = on_head.get_cached_autoscaling_config()
    types = {name: one for name, one in config.get_node_type_configs().items() if name != "head"}
    bounds = {name: (one.min_worker_nodes, one.max_worker_nodes) for name, one in types.items()}
    assert bounds == {"actor": (0, 8), "reward": (0, 2), "learner": (0, 2)}
    assert sum(most for _, most in bounds.values()) == config.get_config("max_workers")
    assert {name: one.resources["GPU"] for name, one in types.items()} == {
        "actor": 1,
        "reward": 4,
        "learner": 1,
    }
    assert config.get_node_type_configs()["head"].resources["CPU"] == 0


def test_the_head_is_set_up_for_dependencies_the_token_and_runs_that_stay(head: Recorder) -> None:
    order = [
        head.position(text)
        for text in ("cloud-init", "-m venv", "pip install -q -r requirements", "boto3", "--head")
    ]
    assert order == sorted(order)
    assert head.copied["~/.ray/auth_token"] == "the token"
    assert {"~/amortize/pyproject.toml", "~/amortize/constraints.txt"} <= head.copied.keys()
    assert not any("amortize" in text and "pip install -e" in text for text in head.commands)
    start = head.commands[head.position("ray start --head")]
    for part in ("RAY_AUTH_MODE=token", "AMORTIZE_RUNS=/srv/amortize/runs", "--dashboard-host=127"):
        assert part in start
    assert "HF_TOKEN=$(cat" in start and "HF_HOME=/srv/amortize/" in start
    assert "the token" not in FILE.read_text() + json.dumps(head.commands)


@pytest.mark.parametrize("kind", WORKERS)
def test_the_head_sets_up_workers_with_the_token_and_the_runs(
    kind: str, launched: dict[str, dict[str, Any]], on_head: FileConfigReader
) -> None:
    config = on_head.get_cached_autoscaling_config()
    provider = _get_node_provider(config.get_config("provider"), config.get_config("cluster_name"))
    provider.non_terminated_nodes({})
    recorder = Recorder()
    instance = Instance(
        instance_type=kind, cloud_instance_id=launched[kind]["InstanceId"], node_kind=1
    )
    RayInstaller(provider, config, process_runner=recorder).install_ray(instance, "10.0.0.1")
    assert recorder.copied["~/.ray/auth_token"] == "the token"
    mount = recorder.commands[recorder.position("mount -t nfs4")]
    assert "RAY_HEAD_IP=10.0.0.1" in mount
    start = recorder.commands[recorder.position("ray start")]
    assert "RAY_AUTH_MODE=token" in start and "--address=$RAY_HEAD_IP:6379" in start
    assert recorder.position("mount -t nfs4") < recorder.position("ray stop")  # Ray is there
    assert "HF_TOKEN=$(cat" in start and "HF_HOME=/srv/amortize/" in start
    assert recorder.copied["~/.cache/huggingface/token"] == "the token of the hub"
    assert f"amortize-part: {kind}" in start or f'"amortize-part":"{kind}"' in start
    said = json.dumps(recorder.commands)
    assert "pip" not in said.replace("pipefail", "") and "the token" not in said

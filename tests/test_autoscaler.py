"""Ray's autoscaler follows a run that is scaled: with its own stand-in for machines, which starts
real nodes as processes."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from cluster.distributed.ray_cluster import living_nodes, may_grow
from tests.light_run import LightRun
from tests.test_job_submit import end, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
HEAD_ID = "f" * 51 + "00000"  # the stand-in numbers its machines so, from the head on
TIMEOUT_S = 90.0


def description(address: str) -> dict[str, object]:
    """What `ray start` is told of the machines: a head of 1 CPU, and up to 2 workers of 1."""
    machine = {"resources": {"CPU": 1}, "node_config": {}}
    return {
        "cluster_name": "elastic",
        "max_workers": 2,
        "idle_timeout_minutes": 0.05,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {**machine, "min_workers": 0, "max_workers": 0},
            "worker": {**machine, "min_workers": 0, "max_workers": 2},
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


@pytest.fixture
def growing_cluster() -> Iterator[None]:
    """A head whose autoscaler starts nodes on this machine; joined, and ended with all of them."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="am") as name:
        port = free_port()
        node = ray.util.get_node_ip_address()  # `ray start` takes loopback for this one
        address = f"{node}:{port}"
        machines = Path(name) / "machines.json"
        machines.write_text(json.dumps(description(address)))
        command = [
            *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"),
            *("--num-cpus=1", f"--node-ip-address={node}", f"--port={port}"),
            *(f"--temp-dir={name}/ray", "--include-dashboard=false"),
            f"--autoscaling-config={machines}",
        ]
        environment = os.environ | {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "RAY_NODE_TYPE_NAME": "ray.head.default",
            "RAY_USAGE_STATS_ENABLED": "0",
            # Who joins reads the mode when it imports Ray: too late for this process.
            "RAY_AUTH_MODE": "disabled",
        }
        with (Path(name) / "head.log").open("w") as log:
            head = subprocess.Popen(
                command,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait(lambda: listens(node, port), (Path(name) / "head.log").read_text)
            ray.init(address, log_to_driver=False)
            yield
        finally:
            ray.shutdown()
            end(head)
            end_nodes(name)


def end_nodes(folder: str) -> None:
    """Kill what the stand-in started; its nodes are children of nobody once the head is gone."""
    left = []
    for process in psutil.process_iter():
        try:
            if f"{folder}/ray" in " ".join(process.cmdline()):
                process.kill()
                left.append(process)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=30)


def listens(node: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((node, port)) == 0


def wait(holds: Callable[[], bool], say: Callable[[], str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, say()
        time.sleep(0.2)


@pytest.mark.usefixtures("growing_cluster")
def test_nodes_come_for_actors_that_are_added_and_go_with_them() -> None:
    assert may_grow()
    light = LightRun()
    light.until(lambda: light.supervisor.settled)
    first = light.pids()
    assert len(living_nodes()) == 1
    light.supervisor.scale(actors=5)  # 1.75 CPU in all, and the head has 1
    light.until(lambda: light.supervisor.settled, timeout_s=TIMEOUT_S)
    assert len(living_nodes()) == 2
    assert first.items() <= light.pids().items()

    light.supervisor.scale(actors=1)
    light.until(lambda: light.supervisor.settled)
    light.until(lambda: len(living_nodes()) == 1, timeout_s=TIMEOUT_S)
    assert light.pids() == first
    assert light.supervisor.stop(10) == []

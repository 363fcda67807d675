"""Machines of one's own, for real: `ray up`, a job across hosts, a host that is lost, `ray down`.

A laptop, a head and two workers, each in namespaces of its own (`tests/hosts.py`), joined by a
network and SSH. cluster/local.yaml is used as it ships and the commands are those of
docs/cluster.md; only the installation is spared: the hosts find the environment of this checkout
where they would build theirs.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hosts import Host, network, why_not
from tests.page import command

ROOT = Path(__file__).resolve().parent.parent
PAGE = "docs/cluster.md"
CLUSTER = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
ADDRESSES = [CLUSTER["provider"]["head_ip"], *CLUSTER["provider"]["worker_ips"]]
RUNS = "/srv/amortize/runs"
# One host holds one reward rank or one learner rank; actor and evaluator may share one.
SMALL = (
    "actors.groups_per_batch=2 actors.group_size=4 learner.groups_per_step=2"
    " learner.replayed_per_group=2 learner.warmup_steps=0 learner.steps=100000"
    " learner.checkpoint_every_steps=2 evaluation.samples=1 evaluation.max_items=2"
    " cluster.actors=1 cluster.actor_placement.cpus=1.0 cluster.reward_placement.cpus=1.5"
    " cluster.learner_placement.cpus=1.5 cluster.time_limit_s=100000.0"
)
# A lost host shows in seconds instead of half a minute, and workers without a head end at once.
MACHINE = """\
export OMP_NUM_THREADS=1 PIP_NO_INDEX=1 RAY_DISABLE_IMPORT_WARNING=1
export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=5000
export RAY_health_check_failure_threshold=3 RAY_gcs_rpc_server_reconnect_timeout_s=5
export AUTOSCALER_UPDATE_INTERVAL_S=1 AUTOSCALER_HEARTBEAT_TIMEOUT_S=15
export RAY_USAGE_STATS_ENABLED=0
"""
SSHD = (
    "exec $(command -v sshd) -D -e -f /dev/null -h ~/.ssh/host_key -o UsePAM=no -o StrictModes=no"
    " -o PermitRootLogin=yes -o PidFile=none -o AuthorizedKeysFile=$HOME/.ssh/authorized_keys"
)
WHOLE = {"actors": 1, "replicas": 1}
TIMEOUT_S = 240.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True, slots=True)
class Machines:
    """What the test has: the user's laptop with the project in ~/project, and the cluster."""

    hosts: dict[str, Host]
    folder: Path

    @property
    def laptop(self) -> Host:
        return self.hosts["laptop"]

    def type(self, line: str, *, timeout_s: float = TIMEOUT_S) -> str:
        """What a command prints that the user types in the project."""
        try:
            return self.laptop.run(f"cd project; {USER}; {line}", timeout_s=timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n\n{self.logs()}") from None

    def wait(self, what: str, holds: Callable[[], Any], *, timeout_s: float = TIMEOUT_S) -> Any:
        """Wait until `holds` is true; its value. The error shows every log there is."""
        deadline = time.monotonic() + timeout_s
        while not (value := holds()):
            assert time.monotonic() < deadline, (
                f"not within {timeout_s:.0f} s: {what}\n{self.logs()}"
            )
            time.sleep(0.5)
        return value

    def state(self) -> dict[str, Any]:
        """What the run's state.json says."""
        path = self.folder / "shared" / "runs" / "first" / "state.json"
        unknown = {"step": -1, "phase": "none", "actual": {}, "message": ""}
        return json.loads(path.read_text()) if path.exists() else unknown

    def parts(self) -> dict[str, str]:
        """Node id of each live part of the run, by class."""
        line = command(PAGE, "ray list actors") + " --format json"
        listed = json.loads(after_noise(self.type(line)))
        return {one["class_name"]: one["node_id"] for one in listed}

    def nodes(self) -> dict[str, str]:
        """Host of each live node by node id."""
        line = "ray list nodes --address http://127.0.0.1:8265 --format json --filter state=ALIVE"
        names = {host.address: name for name, host in self.hosts.items()}
        listed = json.loads(after_noise(self.type(line)))
        return {one["node_id"]: names[one["node_ip"]] for one in listed}

    def logs(self) -> str:
        """Ends of all logs that tell why something did not happen."""
        wanted = ["shared/runs/*/state.json", "*/sshd.log", "laptop/*.log"]
        session = "*/tmp/ray/session_2*/logs"
        wanted += [f"{session}/{name}" for name in ("job-driver-*", "monitor.log", "raylet.err")]
        wanted += [f"{session}/worker-*.err", f"{session}/python-core-driver-*.log"]
        found = [path for pattern in wanted for path in sorted(self.folder.glob(pattern))]
        return "\n".join(
            f"==> {path.relative_to(self.folder)}\n{path.read_text(errors='replace')[-1500:]}"
            for path in found
            if path.stat().st_size
        )


USER = command(PAGE, "export RAY_AUTH_MODE")


def after_noise(text: str) -> str:
    """Output from its first JSON bracket on: Ray writes warnings before it."""
    return text[re.search(r"^\[", text, flags=re.MULTILINE).start() :]  # type: ignore[union-attr]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """Four hosts, keys in place, sshd listening; nothing of Ray runs yet."""
    if reason := why_not(("ssh", "ssh-keygen", "sshd", "rsync")):
        pytest.skip(reason)
    names = {f"worker-{number}": address for number, address in enumerate(ADDRESSES[1:], start=1)}
    addresses = {"laptop": other_address(ADDRESSES), "head": ADDRESSES[0], **names}
    user = CLUSTER["auth"]["ssh_user"]
    with network(addresses, folder=tmp_path, user=user, shared="/srv/amortize") as hosts:
        machines = Machines(hosts, tmp_path)
        copy_project(tmp_path / "laptop" / "home" / "project")
        key = CLUSTER["auth"]["ssh_private_key"]
        machines.laptop.run(
            f"mkdir -p ~/.ssh; ssh-keygen -q -t ed25519 -N '' -f {key}", timeout_s=20
        )
        public = (tmp_path / "laptop/home" / key.removeprefix("~/")).with_suffix(".pub")
        for host in hosts.values():
            if host is not machines.laptop:
                be_a_node(host, public.read_text())
        yield machines


def be_a_node(host: Host, public_key: str) -> None:
    """Give a host what docs/cluster.md asks of one."""
    home = host.folder / "home"
    (home / ".ssh").mkdir(mode=0o700)
    (home / ".ssh" / "authorized_keys").write_text(public_key)
    (home / ".bashrc").write_text(MACHINE)
    (home / "amortize").mkdir()
    (home / "amortize" / "venv").symlink_to(sys.prefix)
    host.run("ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/host_key", timeout_s=20)
    # Ray's commands end whatever they find: make sure that on a host they find nothing of ours.
    for kind in ("pid", "net", "mnt"):
        inside = host.run(f"readlink /proc/self/ns/{kind}", timeout_s=20).strip()
        assert inside != os.readlink(f"/proc/self/ns/{kind}"), f"{host.name} is not its own {kind}"
    host.start(SSHD, host.folder / "sshd.log")


def copy_project(target: Path) -> None:
    """A checkout of the project as it is."""
    listed = subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def other_address(taken: list[str]) -> str:
    prefix = taken[0].rpartition(".")[0]
    return next(one for n in range(2, 250) if (one := f"{prefix}.{n}") not in taken)


def test_a_cluster_of_ones_own_machines_runs_a_job_and_outlives_the_loss_of_a_host(
    machines: Machines,
) -> None:
    for line in ("ray get-auth-token", "chmod 600"):
        machines.type(command(PAGE, line))
    machines.type(command(PAGE, "ray up -y cluster/local.yaml"), timeout_s=300)
    tunnel(machines)
    machines.wait("three nodes", lambda: len(machines.nodes()) == 3)

    submit = command(PAGE, "ray job submit", "--submission-id first ")
    machines.type(f"{submit} {SMALL}")
    machines.wait("training", lambda: machines.state()["step"] >= 2)
    parts, nodes = machines.parts(), machines.nodes()
    roles = ("RolloutWorker", "RewardWorker", "LearnerWorker")
    assert len({parts[role] for role in roles}) == 3, f"not on three hosts: {parts}"
    assert nodes[parts["WeightStoreService"]] == "head", "the weight store would go with a host"
    assert "learner is up" in machines.type(command(PAGE, "ray job logs"))

    holder = {nodes[node]: role for role, node in parts.items() if role in roles}
    victim = next(name for name in ("worker-1", "worker-2") if holder[name] != "LearnerWorker")
    cut_off(machines, victim, role=holder[victim])
    machines.hosts[victim].plug()
    machines.wait("the host is back", lambda: victim in machines.nodes().values())
    # Steps alone would not tell: the buffer holds groups for more than a few.
    machines.wait("the run is whole again", lambda: machines.state()["actual"] == WHOLE)
    step = machines.state()["step"]
    machines.wait("training again", lambda: machines.state()["step"] >= step + 2)

    machines.type(command(PAGE, "ray job stop"))
    stopped = machines.state()
    assert (stopped["phase"], stopped["killed"]) == ("stopped", []), machines.logs()

    machines.type(command(PAGE, "ray rsync-down"))
    assert (machines.folder / "laptop/home/project/runs/first/config.toml").exists()
    machines.type(command(PAGE, "ray down"))
    for name in ("head", "worker-1", "worker-2"):
        host = machines.hosts[name]
        machines.wait(f"no Ray on {name}", lambda host=host: not raylets(host))  # type: ignore[misc]


def tunnel(machines: Machines) -> None:
    """`ray dashboard` in the user's second terminal, until the laptop is gone."""
    line = f"cd project; {USER}; {command(PAGE, 'ray dashboard')}"
    terminal = machines.laptop.start(line, machines.folder / "laptop" / "dashboard.log")
    port = "exec 3<>/dev/tcp/127.0.0.1/8265"

    def open_() -> bool:
        assert terminal.poll() is None, f"'ray dashboard' ended:\n{machines.logs()}"
        return subprocess.run(machines.laptop.command(port), capture_output=True).returncode == 0

    machines.wait("the tunnel to the dashboard", open_)


def cut_off(machines: Machines, name: str, *, role: str) -> None:
    """Take a host off the network until the run has noticed."""
    kind = {"RolloutWorker": "actors", "RewardWorker": "replicas"}[role]
    machines.hosts[name].unplug()
    machines.wait(
        f"the run misses the {role} on {name}", lambda: machines.state()["actual"][kind] == 0
    )
    machines.wait("the cluster misses the host", lambda: name not in machines.nodes().values())
    assert machines.state()["phase"] == "training"


def raylets(host: Host) -> str:
    return host.run("ps -C raylet -o pid= || true", timeout_s=20).strip()

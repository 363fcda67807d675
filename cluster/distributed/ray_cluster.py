"""The Ray cluster of a run: joining it, and what its nodes have."""

import logging
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ray
from ray import _raylet
from ray._private import worker as ray_worker
from ray.job_config import JobConfig

from cluster.config.project import PACKAGES, PROJECT_ROOT, UserError
from cluster.config.schema import RunConfig
from cluster.run.directory import RAY_PACKAGE
from cluster.run.display import first_line, inspector_address
from cluster.run.identity import own_sources
from cluster.run.resources import Node, describe

# Ray labels a node with its type where a launcher or an operator (`ray up`, KubeRay) started it.
_NODE_TYPE = "ray.io/node-group"
_ANSWER_TIMEOUT_S = 30.0


def join_cluster(config: RunConfig, address: str, namespace: str) -> RunConfig:
    """Join the cluster at `address`; the configuration with Redis where all its nodes reach it."""
    connect_ray(config, address, namespace)
    if config.buffer.bind != "auto":
        return config
    return config.changed({"buffer.bind": ray.util.get_node_ip_address()})


def namespace_of(run: str) -> str:
    """Ray namespace of a run's named actors."""
    return f"amortize-{run}"


def connect_ray(config: RunConfig, address: str | None, namespace: str) -> None:
    """Join the cluster at `address`, or start Ray on this machine, on loopback only.

    A process that has joined already stays where it is. Raises UserError.
    """
    if ray.is_initialized():
        return
    # Notices that Ray has for its own users, of tokens and of folders that it does not pack.
    logging.getLogger("ray").setLevel(logging.ERROR)
    ray_worker._worker_logs_enabled = False  # a raylet's: of a death our own events tell
    settings: dict[str, Any]
    if address is not None:
        check_reachable(address)
        settings = {"address": address, "logging_level": logging.ERROR}
    else:
        settings = {
            "num_cpus": config.cluster.cpus,
            "include_dashboard": config.cluster.dashboard,
            "_node_ip_address": "127.0.0.1",
            "configure_logging": False,
        }
    if not (address or "").startswith("ray://"):  # Ray's client takes no job's configuration
        # Whoever lists the jobs of a cluster finds the run, and where `amortize inspect` shows it.
        run = namespace.removeprefix(namespace_of(""))
        metadata = {"job_name": run, "inspector": inspector_address(run)}
        settings["job_config"] = JobConfig(metadata=metadata)
    # Ray's handler would end this process at a SIGTERM that is a request to stop in order.
    handler = signal.getsignal(signal.SIGTERM)
    environment = source_for_workers(config)
    try:
        ray.init(
            namespace=namespace,
            runtime_env=environment,
            log_to_driver=False,
            **settings,
        )
    except Exception as error:  # of many classes
        raise UserError(
            f"Ray did not come up: {first_line(error)}: try again, when this machine has less to "
            f"do; Ray's logs are in /tmp/ray/session_latest/logs"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def leave_cluster() -> None:
    """Leave the cluster; one that this process started ends with it."""
    ray.shutdown()


def check_reachable(address: str, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> None:
    """Raise UserError unless a Ray cluster answers in time; Ray would try for minutes, silently.

    What is no host and port, such as "auto", is left to Ray.
    """
    host, _, port = address.rpartition(":")
    if address in ("auto", "local") or address.startswith("ray://"):
        return
    # A process of its own, because nothing ends Ray's wait for an address that accepts and is mute.
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
        subprocess.run(command, capture_output=True, timeout=timeout_s, check=True)
    except subprocess.TimeoutExpired:
        reason = f"no answer within {timeout_s:.0f} s"
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.decode(errors="replace").strip().splitlines() or ["refused"])[-1]
    except (OSError, ValueError) as error:
        reason = str(error)
    else:
        return
    raise UserError(
        f"no Ray cluster answers at {address!r} ({reason}): give the address of one that runs, "
        f"HOST:PORT as 'ray start --head' prints it, with --address, cluster.address or "
        f"RAY_ADDRESS, or give none to start one on this machine"
    )


def source_for_workers(config: RunConfig) -> dict[str, Any]:
    """Runtime environment that gives every worker the source of this process, as it is now.

    Else workers would import what lies on their node when they start: another checkout, or files
    that were edited since. A job has brought its code to all nodes already.
    """
    if PROJECT_ROOT.name.startswith(RAY_PACKAGE):
        return {}
    # Patterns as in .gitignore. The folder itself is '.', which '/*' would exclude as well.
    excludes = ["/*", "!.", *(f"!/{package}" for package in PACKAGES)]
    environment = {"working_dir": str(PROJECT_ROOT), "excludes": excludes}
    own = own_sources(config)
    for folder in filter(Path.is_dir, own):  # Ray applies the patterns to them too
        excludes += [f"!/{path.name}" for path in folder.iterdir() if path.name != "__pycache__"]
    return environment | ({"py_modules": [str(path) for path in own]} if own else {})


def living_nodes() -> list[Node]:
    """CPUs and GPUs that each living node has in all."""
    totals = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(total.get("CPU", 0.0), total.get("GPU", 0.0)) for total in totals]


def hasty(config: RunConfig) -> str:
    """A sentence where parts are given up before Ray gives up a node that hangs; else empty."""
    checks: Any = _raylet.Config  # type: ignore[attr-defined]
    each_ms = checks.health_check_period_ms() + checks.health_check_timeout_ms()
    node_s = each_ms * checks.health_check_failure_threshold() / 1000
    if (silence_s := config.cluster.silence_timeout_s) > node_s:
        return ""
    return (
        f"cluster.silence_timeout_s ({silence_s:g}) is no longer than Ray needs to notice a node "
        f"that hangs ({node_s:g} s): parts of such a node may be placed on it again, and wait for "
        "it; set more, or lower RAY_health_check_period_ms, _timeout_ms and _failure_threshold of "
        "the whole cluster and of this driver"
    )


def node_ids() -> frozenset[str]:
    """Of the living nodes."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def may_grow() -> bool:
    """Whether an autoscaler keeps the cluster, so that nodes which are missing may come."""
    return any(node["Labels"].get(_NODE_TYPE) for node in ray.nodes() if node["Alive"])


def room() -> str:
    """What the nodes have and what of it is free, for people."""
    free = ray.available_resources()
    return (
        f"the cluster has {describe(living_nodes())}; free in all: "
        f"{free.get('CPU', 0.0):g} CPU, {free.get('GPU', 0.0):g} GPU"
    )

"""Being on a Ray cluster."""

from typing import Any

import ray

from cluster.config import RunConfig
from cluster.config_file import PROJECT_ROOT
from cluster.fingerprint import PACKAGES
from cluster.rundir import RAY_PACKAGE


def join_cluster(config: RunConfig, address: str, namespace: str) -> RunConfig:
    """Join the cluster at `address`; the configuration with Redis where all its nodes reach it."""
    connect_ray(config, address, namespace)
    if config.buffer.bind != "auto":
        return config
    buffer = config.buffer.model_copy(update={"bind": ray.util.get_node_ip_address()})
    return config.model_copy(update={"buffer": buffer})


def namespace_of(run: str) -> str:
    """Ray namespace of a run's named actors."""
    return f"amortize-{run}"


def connect_ray(config: RunConfig, address: str | None, namespace: str) -> None:
    """Join the cluster at `address`, or start Ray on this machine, on loopback only.

    A process that has joined already stays where it is.
    """
    if ray.is_initialized():
        return
    if address is not None:
        ray.init(
            address=address,
            namespace=namespace,
            runtime_env=source_for_workers(),
            log_to_driver=False,
        )
        return
    ray.init(
        runtime_env=source_for_workers(),
        namespace=namespace,
        num_cpus=config.cluster.cpus,
        include_dashboard=config.cluster.dashboard,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        configure_logging=False,
    )


def source_for_workers() -> dict[str, Any]:
    """Runtime environment that gives every worker the source of this process, as it is now.

    Without it workers would import what lies on their node when they start: another checkout, or
    files that were edited since. A job has brought its code to all nodes already.
    """
    if PROJECT_ROOT.name.startswith(RAY_PACKAGE):
        return {}
    # Patterns as in .gitignore. The folder itself is '.', which '/*' would exclude as well.
    all_but_ours = ["/*", "!.", *(f"!/{package}" for package in PACKAGES)]
    return {"working_dir": str(PROJECT_ROOT), "excludes": all_but_ours}

"""The nodes of the Ray cluster that this process has joined."""

import ray

from cluster.run.resources import Node, describe

# Ray labels a node with its type where a launcher or an operator (`ray up`, KubeRay) started it.
_NODE_TYPE = "ray.io/node-group"


def living_nodes() -> list[Node]:
    """What each node that lives may give away in all."""
    totals = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(total.get("CPU", 0.0), total.get("GPU", 0.0)) for total in totals]


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

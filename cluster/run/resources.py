"""Whether a run fits on the CPUs and GPUs of the nodes there are."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from cluster.config.placement import GroupPlacement, Placement
from cluster.config.project import UserError
from cluster.config.schema import RunConfig

_ROUNDING = 1e-9
_RESOURCES = (("CPU", "cpus"), ("GPU", "gpus"))


class Node(NamedTuple):
    """What one node may give away."""

    cpus: float
    gpus: float


class Demand(NamedTuple):
    """Processes of one kind: `number` in all, of which `together` must share a node."""

    what: str
    number: int
    claim: Placement
    key: str
    together: int = 1


def check_fit(config: RunConfig, nodes: Sequence[Node]) -> None:
    """Raise UserError, naming what is missing, if the run can never stand at once on the nodes.

    Ray would wait for ever for a place that does not exist. What passes may still have to wait
    until others give up theirs.
    """
    demands = demands_of(config)
    _check_sums(demands, nodes)
    for demand in demands:
        _check_one_node(demand, nodes)


def demands_of(config: RunConfig) -> list[Demand]:
    """What the parts of a run claim."""
    cluster = config.cluster

    def ranks(kind: str, groups: int, number: int, claim: GroupPlacement) -> Demand:
        together = number if claim.strategy == "STRICT_PACK" else 1
        return Demand(f"{kind} ranks", groups * number, claim, kind, together)

    demands = [
        Demand("rollout actors", cluster.actors, cluster.actor_placement, "actor"),
        ranks("reward", config.reward_replicas, config.reward.ranks, cluster.reward_placement),
        ranks("learner", 1, config.learner.ranks, cluster.learner_placement),
        Demand("evaluator", 1, cluster.actor_placement, "actor"),
    ]
    return [demand for demand in demands if demand.number]


def describe(nodes: Sequence[Node]) -> str:
    """Nodes for people, equal ones together: '1 node with 2 CPU, 0 GPU; 3 nodes with ...'."""
    tally = Counter(nodes)
    parts = (
        f"{count} node{'s' if count > 1 else ''} with {node.cpus:g} CPU, {node.gpus:g} GPU"
        for node, count in sorted(tally.items())
    )
    return "; ".join(parts) or "no nodes"


def _check_sums(demands: Sequence[Demand], nodes: Sequence[Node]) -> None:
    for resource, attribute in _RESOURCES:
        wanted = sum(demand.number * getattr(demand.claim, attribute) for demand in demands)
        offered = sum(getattr(node, attribute) for node in nodes)
        if wanted > offered + _ROUNDING:
            parts = ", ".join(
                f"{demand.number} {demand.what} x {getattr(demand.claim, attribute):g}"
                for demand in demands
            )
            raise UserError(
                f"the run needs {wanted:g} {resource} ({parts}), but there are {offered:g}, "
                f"{wanted - offered:g} too few ({describe(nodes)}): lower cluster.actors, "
                f"reward.replicas, reward.ranks, learner.ranks or the "
                f"cluster.*_placement.{attribute} shares, or add nodes"
            )


def _check_one_node(demand: Demand, nodes: Sequence[Node]) -> None:
    cpus = demand.together * demand.claim.cpus
    gpus = demand.together * demand.claim.gpus
    if any(node.cpus + _ROUNDING >= cpus and node.gpus + _ROUNDING >= gpus for node in nodes):
        return
    who = f"each of the {demand.what}"
    if demand.together > 1:
        who = f"{demand.together} {demand.what} together (STRICT_PACK)"
    raise UserError(
        f"{who} must have {cpus:g} CPU and {gpus:g} GPU on one node, but no node has them "
        f"({describe(nodes)}): lower cluster.{demand.key}_placement, or add a larger node"
    )

"""Whether a run fits on the CPUs and GPUs of the nodes there are."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from cluster.config.placement import GroupPlacement, Placement
from cluster.config.project import UserError
from cluster.config.schema import RunConfig

_ROUNDING = 1e-9
_EVALUATOR = "evaluator"
_PARTS = ("actor", "reward", "learner")
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
    until others give up theirs, as an evaluator does.
    """
    demands = demands_of(config)
    _check_sums([demand for demand in demands if demand.what != _EVALUATOR], nodes)
    for demand in demands:
        _check_one_node(demand, nodes)


def has_place_for_evaluator(config: RunConfig, nodes: Sequence[Node]) -> bool:
    """Whether the nodes hold one beside all other parts; else it has to wait for their end."""
    try:
        _check_sums(demands_of(config), nodes)
    except UserError:
        return False
    return True


def with_gpu_shares(config: RunConfig, gpus: int) -> RunConfig:
    """The run with this machine's GPUs divided among its processes, where none claims any.

    All get equal shares, but ranks that compute together a GPU each, as NCCL wants. Raises
    UserError where that is more than there are.
    """
    if not gpus or config.lm.device == "cpu" or _claims_gpus(config):
        return config
    demands = [demand for demand in demands_of(config) if demand.what != _EVALUATOR]
    ranks = {"reward": config.reward.ranks, "learner": config.learner.ranks}
    whole = [demand for demand in demands if ranks.get(demand.key, 1) > 1]
    shared = sum(demand.number for demand in demands if demand not in whole)
    left = gpus - sum(demand.number for demand in whole)
    if left < bool(shared):
        raise UserError(
            "ranks that compute together need a GPU each, which with one for the other parts is "
            f"more than this machine's {gpus}: lower learner.ranks, reward.ranks or "
            "reward.replicas, or set lm.device=cpu"
        )
    # As many to a GPU as have to be; the actors' share is the evaluator's too.
    share = math.floor(100 / math.ceil(shared / left)) / 100 if shared else 1.0
    if not share:
        raise UserError(
            f"{shared} processes are too many for {left} GPUs: lower cluster.actors or "
            "reward.replicas, or set lm.device=cpu"
        )
    claims = {part: 1.0 if part in {d.key for d in whole} else share for part in _PARTS}
    return config.changed({f"cluster.{part}_placement.gpus": n for part, n in claims.items()})


def unclaimed_gpus(config: RunConfig, nodes: Sequence[Node], *, grows: bool) -> str:
    """A sentence where the cluster has GPUs, or may get some, and parts of the run claim none.

    Args:
        nodes: that are up.
        grows: whether an autoscaler keeps the cluster; what it might start, only its file tells.
    """
    gpus = sum(node.gpus for node in nodes)
    claims = {d.key: d.claim.gpus for d in demands_of(config) if d.what != _EVALUATOR}
    without = [part for part in _PARTS if claims.get(part) == 0]
    if not (gpus or grows) or config.lm.device == "cpu" or not without:
        return ""
    has = f"the nodes that are up have {gpus:g} GPUs"
    if not gpus:
        has = "no node that is up has a GPU, and the autoscaler starts none for who claims none"
    return (
        f"{has}: these parts claim none, so they work on CPUs: {', '.join(without)}; where that is "
        "meant, set lm.device=cpu, else "
        + ", ".join(f"cluster.{part}_placement.gpus" for part in without)
    )


def _claims_gpus(config: RunConfig) -> bool:
    return any(demand.claim.gpus for demand in demands_of(config))


def demands_of(config: RunConfig) -> list[Demand]:
    """What the parts of a run claim."""
    cluster = config.cluster

    def ranks(kind: str, groups: int, number: int, claim: GroupPlacement) -> Demand:
        together = number if claim.strategy == "STRICT_PACK" else 1
        return Demand(f"{kind} ranks", groups * number, claim, kind, together)

    demands = [
        Demand("rollout actors", config.rollout_actors, cluster.actor_placement, "actor"),
        ranks("reward", config.reward_replicas, config.reward.ranks, cluster.reward_placement),
        ranks("learner", 1, config.learner.ranks, cluster.learner_placement),
        Demand(_EVALUATOR, 1, cluster.actor_placement, "actor"),
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

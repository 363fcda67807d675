"""Makes Ray actors of a run's plain classes, each worker group in a placement of its own."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from cluster.config.placement import PART_LABEL, Placement
from cluster.config.schema import RunConfig
from cluster.distributed.evaluation_worker import EvaluationWorker
from cluster.distributed.learner_worker import LearnerWorker
from cluster.distributed.reward_worker import RewardWorker
from cluster.distributed.rollout_worker import RolloutWorker
from cluster.distributed.worker import CONCURRENCY, Member, RunContext, Worker

# Of the driver's environment, as far as it is set. Ray shows it to whoever asks: no secrets.
CARRIED = ("DS_ACCELERATOR", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE")

Create = Callable[[list[dict[str, Any]]], list[ActorHandle]]

# Part -> for which others its node must not be kept.
_OTHERS = {
    "actor": "evaluator, learner, reward",
    "evaluator": "learner, reward",  # it may have an actor's
    "learner": "actor, evaluator, reward",
    "reward": "actor, evaluator, learner",
}


@dataclass(kw_only=True)
class GroupLaunch:
    """Room for a worker group on the cluster, and what makes its ranks there.

    Room is requested at once, got for all ranks or none, and held until `give_up`, or until the
    driver ends. A group of one goes to the node that has most of its claim to spare.
    """

    name: str
    claim: Placement  # of each rank
    num_ranks: int
    strategy: str
    make: Create  # the Ray actors, rank 0 first, from the options that give each its place
    labels: Mapping[str, str] = field(default_factory=dict)  # of the nodes that are good for it

    def __post_init__(self) -> None:
        claim, ranks = self.claim, self.num_ranks
        bundle = {"CPU": claim.cpus, "GPU": claim.gpus}
        self._group = placement_group(
            [{key: value for key, value in bundle.items() if value}] * ranks,
            strategy=self.strategy,
            name=self.name,
            bundle_label_selector=[dict(self.labels)] * ranks if self.labels else None,
        )
        self.ready = self._group.ready()
        each = f"{claim.cpus:g} CPU, {claim.gpus:g} GPU"
        self.wanted = each if ranks == 1 else f"{ranks} ranks x ({each}), {self.strategy}"
        self.wanted += "".join(f" on {key}={value}" for key, value in self.labels.items())

    def create(self) -> list[ActorHandle]:
        """Make the ranks, rank 0 first, once there is room."""
        return self.make([self._place(rank) for rank in range(self.num_ranks)])

    def give_up(self) -> None:
        """Let others have the room; ends what still runs in it."""
        remove_placement_group(self._group)

    def _place(self, rank: int) -> dict[str, Any]:
        where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
        return {
            "num_cpus": self.claim.cpus,
            "num_gpus": self.claim.gpus,
            "scheduling_strategy": where,
        }


@dataclass
class Launcher:
    """Creates the processes of one run, named in a namespace of its own."""

    config: RunConfig
    namespace: str

    def service(self, service: type, name: str) -> ActorHandle:
        """A small process on the driver's node, which Ray starts again should it die.

        On another, where Ray may put what claims nothing, it would go with a node that the run
        survives; a soft wish is not heeded.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"name": name, "namespace": self.namespace, "num_cpus": 0}
        restarts = {"max_restarts": -1, "max_task_retries": 2}
        return ray.remote(service).options(**options, **restarts, scheduling_strategy=here).remote()

    def launch(
        self, context: RunContext, name: str, *arguments: Any, incarnation: int
    ) -> GroupLaunch:
        """The worker group called actor-N, reward-N, learner or evaluator-N.

        Args:
            arguments: of the worker, behind context and member.
        """
        kind, _, index = name.partition("-")
        worker, claim, strategy, num_ranks = self._layout(kind)
        member = Member(name=name, index=int(index or 0), incarnation=incarnation, gpus=claim.gpus)

        def create(places: list[dict[str, Any]]) -> list[ActorHandle]:
            remote = ray.remote(concurrency_groups=dict(worker.concurrency_groups))(worker)
            ranks: list[ActorHandle] = []
            for rank, place in reversed(list(enumerate(places))):  # rank 0 knows the others
                each = replace(member, rank=rank, num_ranks=num_ranks, peers=tuple(ranks))
                options = place | {
                    "name": each.full_name,
                    "namespace": self.namespace,
                    "max_concurrency": CONCURRENCY,
                    "runtime_env": {"env_vars": process_environment(claim)},
                }
                ranks.insert(0, remote.options(**options).remote(context, each, *arguments))
            return ranks

        return GroupLaunch(
            name=member.full_name,
            claim=claim,
            num_ranks=num_ranks,
            strategy=strategy,
            make=create,
            labels={PART_LABEL: f"!in({_OTHERS[kind]})"} | claim.labels,
        )

    def _layout(self, kind: str) -> tuple[type[Worker], Placement, str, int]:
        """Class of the ranks, what each claims, how they lie among the nodes, and how many."""
        cluster = self.config.cluster
        if kind == "actor":
            return RolloutWorker, cluster.actor_placement, "SPREAD", 1
        if kind == "evaluator":
            return EvaluationWorker, cluster.actor_placement, "PACK", 1
        if kind == "reward":
            placement = cluster.reward_placement
            return RewardWorker, placement, placement.strategy, self.config.reward.ranks
        placement = cluster.learner_placement
        return LearnerWorker, placement, placement.strategy, self.config.learner.ranks


def process_environment(claim: Placement) -> dict[str, str]:
    """Of a worker that holds a model.

    Ray would size OMP by `num_cpus`, and shows all GPUs to who claims none; DeepSpeed must build
    no kernels, and is told where there is no GPU, or it probes for one.
    """
    told = {name: os.environ[name] for name in CARRIED if name in os.environ}
    unseen = {} if claim.gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return {"OMP_NUM_THREADS": str(claim.threads), "DS_BUILD_OPS": "0", **unseen, **told}

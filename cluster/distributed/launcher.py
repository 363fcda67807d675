"""Makes Ray actors of a run's plain classes, each worker group in a placement of its own."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from cluster.config.placement import Placement
from cluster.config.schema import RunConfig
from cluster.distributed.evaluation_worker import EvaluationWorker
from cluster.distributed.learner_worker import LearnerWorker
from cluster.distributed.reward_worker import RewardWorker
from cluster.distributed.rollout_worker import RolloutWorker
from cluster.distributed.worker import Member, RunContext, Worker

Create = Callable[[list[dict[str, Any]]], list[ActorHandle]]


class GroupLaunch:
    """Room for a worker group on the cluster, and what makes its ranks there.

    Room is requested at once, got for all ranks or none, and held until `give_up`, or until the
    driver ends, however that ends.

    Args:
        name: of the group, in Ray's dashboard.
        claim: of each rank.
        strategy: Ray's; a group of one goes to the node that has most of its claim to spare.
        create: makes the Ray actors, rank 0 first, from the options that give each its place.
    """

    def __init__(
        self, name: str, claim: Placement, *, num_ranks: int, strategy: str, create: Create
    ) -> None:
        bundle = {"CPU": claim.cpus, "GPU": claim.gpus}
        bundles = [{key: value for key, value in bundle.items() if value}] * num_ranks
        self._group = placement_group(bundles, strategy=strategy, name=name)
        self._claim = claim
        self._num_ranks = num_ranks
        self._create = create
        self.ready = self._group.ready()
        each = f"{claim.cpus:g} CPU, {claim.gpus:g} GPU"
        self.wanted = each if num_ranks == 1 else f"{num_ranks} ranks x ({each}), {strategy}"

    def create(self) -> list[ActorHandle]:
        """Make the ranks, rank 0 first, once there is room."""
        return self._create([self._place(rank) for rank in range(self._num_ranks)])

    def give_up(self) -> None:
        """Let others have the room; ends what still runs in it."""
        remove_placement_group(self._group)

    def _place(self, rank: int) -> dict[str, Any]:
        where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
        return {
            "num_cpus": self._claim.cpus,
            "num_gpus": self._claim.gpus,
            "scheduling_strategy": where,
        }


class Launcher:
    """Creates the processes of one run, named in a namespace of its own."""

    def __init__(self, config: RunConfig, namespace: str) -> None:
        self._config = config
        self._namespace = namespace

    def service(self, service: type, name: str) -> ActorHandle:
        """A small process on the driver's node, which Ray starts again should it die.

        On another, where Ray may put what claims nothing, it would go with a node that the run
        survives; a soft wish is not heeded.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"name": name, "namespace": self._namespace, "num_cpus": 0}
        restarts = {"max_restarts": -1, "max_task_retries": 2}
        return ray.remote(service).options(**options, **restarts, scheduling_strategy=here).remote()

    def launch(self, context: RunContext, name: str, *, incarnation: int) -> GroupLaunch:
        """The worker group called actor-N, reward-N or learner."""
        kind, _, index = name.partition("-")
        member = Member(name=name, index=int(index or 0), incarnation=incarnation)
        cluster = self._config.cluster
        worker: type[Worker]
        if kind == "actor":
            claim = cluster.actor_placement
            return self._group(RolloutWorker, context, member, claim, strategy="SPREAD")
        if kind == "reward":
            worker, ranks = RewardWorker, self._config.reward.ranks
            placement = cluster.reward_placement
        else:
            worker, ranks = LearnerWorker, self._config.learner.ranks
            placement = cluster.learner_placement
        return self._group(
            worker, context, member, placement, strategy=placement.strategy, num_ranks=ranks
        )

    def evaluator(
        self, context: RunContext, name: str, *, incarnation: int, adapter: Path | None, step: int
    ) -> GroupLaunch:
        """A process that evaluates, as a worker group of one."""
        member = Member(name=name, incarnation=incarnation)
        claim = self._config.cluster.actor_placement
        return self._group(
            EvaluationWorker, context, member, claim, strategy="PACK", arguments=(adapter, step)
        )

    def _group(
        self,
        worker: type[Worker],
        context: RunContext,
        member: Member,
        claim: Placement,
        *,
        strategy: str,
        num_ranks: int = 1,
        arguments: tuple[Any, ...] = (),
    ) -> GroupLaunch:
        def create(places: list[dict[str, Any]]) -> list[ActorHandle]:
            remote = ray.remote(worker)
            ranks: list[ActorHandle] = []
            for rank, place in reversed(list(enumerate(places))):  # rank 0 knows the others
                each = replace(member, rank=rank, num_ranks=num_ranks, peers=tuple(ranks))
                options = place | {
                    "name": each.full_name,
                    "namespace": self._namespace,
                    "max_concurrency": worker.concurrency,
                    "runtime_env": {"env_vars": process_environment(claim.threads)},
                }
                ranks.insert(0, remote.options(**options).remote(context, each, *arguments))
            return ranks

        return GroupLaunch(
            member.full_name, claim, num_ranks=num_ranks, strategy=strategy, create=create
        )


def process_environment(threads: int) -> dict[str, str]:
    """Of a worker that holds a model.

    Ray would size OMP by `num_cpus`; DeepSpeed must build no kernels, and is told where there is
    no GPU, or it probes for one.
    """
    accelerator = os.environ.get("DS_ACCELERATOR")
    told = {"DS_ACCELERATOR": accelerator} if accelerator else {}
    return {"OMP_NUM_THREADS": str(threads), "DS_BUILD_OPS": "0", **told}

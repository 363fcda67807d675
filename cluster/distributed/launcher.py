"""Makes Ray actors of a run's plain classes, each worker group in a placement of its own."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from cluster.distributed.services import ReplicaRegistry, WeightStoreService
from cluster.distributed.worker import RunContext

# One thread answers `status` and `stop` while another works; replicas take many calls at once.
_CONTROL_CONCURRENCY = 4
_REPLICA_CONCURRENCY = 64


class Reservation:
    """Room for a worker group on the cluster: requested when made, got for all ranks or none.

    It is held until `give_up`, or until the driver ends, however that ends.

    Args:
        name: of the group, in Ray's dashboard and in messages.
        claim: of each rank.
        strategy: Ray's; a group of one goes to the node that has most of its claim to spare.
    """

    def __init__(self, name: str, claim: Placement, *, num_ranks: int, strategy: str) -> None:
        bundle = {"CPU": claim.cpus, "GPU": claim.gpus}
        self._claim = claim
        self._group = placement_group(
            [{key: value for key, value in bundle.items() if value}] * num_ranks,
            strategy=strategy,
            name=name,
        )
        self.ready = self._group.ready()
        each = f"{claim.cpus:g} CPU, {claim.gpus:g} GPU"
        self.wanted = each if num_ranks == 1 else f"{num_ranks} ranks x ({each}), {strategy}"

    def options(self, rank: int) -> dict[str, Any]:
        """Options of the Ray actor that is this rank."""
        return {
            "num_cpus": self._claim.cpus,
            "num_gpus": self._claim.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=rank
            ),
        }

    def give_up(self) -> None:
        """Let others have it; ends what still runs in it."""
        remove_placement_group(self._group)


@dataclass(frozen=True, slots=True)
class GroupLaunch:
    """A worker group's reservation, and what creates its Ray actors there, rank 0 first."""

    reservation: Reservation
    create: Callable[[], Sequence[ActorHandle]]


class Launcher:
    """Creates the processes of one run, named in a namespace of its own."""

    def __init__(self, config: RunConfig, namespace: str) -> None:
        self._config = config
        self._namespace = namespace

    def weight_store(self) -> ActorHandle:
        """The weight store, on the driver's node, whose loss ends the run anyway."""
        return self._service(WeightStoreService, "weight-store")

    def replica_registry(self) -> ActorHandle:
        """The registry of reward replicas, beside the weight store."""
        return self._service(ReplicaRegistry, "replica-registry")

    def _service(self, service: type, name: str) -> ActorHandle:
        """A process that Ray starts again should it die.

        Ray would choose any node for what claims nothing, and heeds no soft wish; the service
        would then go with a node that the run survives.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return (
            ray.remote(service)
            .options(
                name=name,
                namespace=self._namespace,
                num_cpus=0,
                scheduling_strategy=here,
                max_restarts=-1,
                max_task_retries=2,
            )
            .remote()
        )

    def rollout_actor(self, context: RunContext, *, index: int, incarnation: int) -> GroupLaunch:
        """One rollout actor, as a worker group of one."""
        name = f"actor-{index}"
        claim = self._config.cluster.actor_placement
        reservation = Reservation(f"{name}.{incarnation}", claim, num_ranks=1, strategy="SPREAD")

        def create() -> Sequence[ActorHandle]:
            options = self._options(f"{name}.{incarnation}", claim) | reservation.options(0)
            worker = ray.remote(RolloutWorker).options(**options)
            return [worker.remote(context, name=name, index=index, incarnation=incarnation)]

        return GroupLaunch(reservation, create)

    def reward_replica(self, context: RunContext, *, index: int, incarnation: int) -> GroupLaunch:
        """The ranks of one reward replica; rank 0 carries the replica's name."""
        num_ranks = self._config.reward.ranks
        name = f"reward-{index}.{incarnation}"
        claim = self._config.cluster.reward_placement
        reservation = Reservation(name, claim, num_ranks=num_ranks, strategy=claim.strategy)

        def create() -> Sequence[ActorHandle]:
            worker = ray.remote(RewardWorker)
            followers = [
                worker.options(
                    **self._options(f"{name}.rank{rank}", claim) | reservation.options(rank)
                ).remote(context, name=name, rank=rank, num_ranks=num_ranks)
                for rank in range(1, num_ranks)
            ]
            options = self._options(name, claim) | reservation.options(0)
            leader = worker.options(**options | {"max_concurrency": _REPLICA_CONCURRENCY}).remote(
                context, name=name, rank=0, num_ranks=num_ranks, peers=tuple(followers)
            )
            return [leader, *followers]

        return GroupLaunch(reservation, create)

    def learner(self, context: RunContext, *, incarnation: int) -> GroupLaunch:
        """The ranks of the learner."""
        num_ranks = self._config.learner.ranks
        name = f"learner.{incarnation}"
        claim = self._config.cluster.learner_placement
        reservation = Reservation(name, claim, num_ranks=num_ranks, strategy=claim.strategy)

        def create() -> Sequence[ActorHandle]:
            worker = ray.remote(LearnerWorker)
            return [
                worker.options(
                    **self._options(f"{name}.rank{rank}", claim) | reservation.options(rank)
                ).remote(context, name="learner", rank=rank, num_ranks=num_ranks)
                for rank in range(num_ranks)
            ]

        return GroupLaunch(reservation, create)

    def evaluator(
        self, context: RunContext, *, name: str, adapter: Path | None, incarnation: int
    ) -> GroupLaunch:
        """A process that evaluates, as a worker group of one."""
        claim = self._config.cluster.actor_placement
        full_name = f"{name}.{incarnation}"
        reservation = Reservation(full_name, claim, num_ranks=1, strategy="PACK")

        def create() -> Sequence[ActorHandle]:
            options = self._options(full_name, claim) | reservation.options(0)
            worker = ray.remote(EvaluationWorker).options(**options)
            return [worker.remote(context, name=name, adapter=adapter)]

        return GroupLaunch(reservation, create)

    def _options(self, name: str, claim: Placement) -> dict[str, Any]:
        return {
            "name": name,
            "namespace": self._namespace,
            "num_cpus": claim.cpus,
            "num_gpus": claim.gpus,
            "max_concurrency": _CONTROL_CONCURRENCY,
            "runtime_env": {"env_vars": process_environment(claim.threads)},
        }


def process_environment(threads: int) -> dict[str, str]:
    """Environment of a worker that holds a model.

    Ray would size OMP by `num_cpus`; DeepSpeed must build no kernels, and without a GPU it must be
    told so, or it probes for one.
    """
    environment = {"OMP_NUM_THREADS": str(threads), "DS_BUILD_OPS": "0"}
    if accelerator := os.environ.get("DS_ACCELERATOR"):
        environment["DS_ACCELERATOR"] = accelerator
    return environment

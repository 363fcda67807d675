"""Where plain classes become Ray actors: `ray.remote` is written only here."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config.schema import Placement, RunConfig
from cluster.distributed.evaluation_worker import EvaluationWorker
from cluster.distributed.placement import Place
from cluster.distributed.weight_store_worker import BoardWorker
from cluster.distributed.worker import LearnerWorker, RewardWorker, RolloutWorker, RunContext

# One thread answers `status` and `stop` while another works; replicas take many calls at once.
_CONTROL_CONCURRENCY = 4
_REPLICA_CONCURRENCY = 64


@dataclass(frozen=True, slots=True)
class Launch:
    """A place that was asked for, and what makes the gang's Ray actors in it, rank 0 first."""

    place: Place
    create: Callable[[], Sequence[ActorHandle]]


class Launcher:
    """Creates the processes of one run, named in a namespace of its own."""

    def __init__(self, config: RunConfig, namespace: str) -> None:
        self._config = config
        self._namespace = namespace

    def board(self) -> ActorHandle:
        """The weight board, on the driver's node, whose loss ends the run anyway.

        Ray starts it again should it die. It would choose any node for what claims nothing, and
        minds no soft wish; the board would then go with a node that the run survives.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return (
            ray.remote(BoardWorker)
            .options(
                name="board",
                namespace=self._namespace,
                num_cpus=0,
                scheduling_strategy=here,
                max_restarts=-1,
                max_task_retries=2,
            )
            .remote()
        )

    def rollout_actor(self, context: RunContext, *, index: int, incarnation: int) -> Launch:
        """One rollout actor, as a gang of one."""
        name = f"actor-{index}"
        claim = self._config.cluster.actor_placement
        place = Place(f"{name}.{incarnation}", claim, num_ranks=1, strategy="SPREAD")

        def create() -> Sequence[ActorHandle]:
            options = self._options(f"{name}.{incarnation}", claim) | place.options(0)
            worker = ray.remote(RolloutWorker).options(**options)
            return [worker.remote(context, name=name, index=index, incarnation=incarnation)]

        return Launch(place, create)

    def reward_replica(self, context: RunContext, *, index: int, incarnation: int) -> Launch:
        """The ranks of one reward replica; rank 0 carries the replica's name."""
        num_ranks = self._config.reward.ranks
        name = f"reward-{index}.{incarnation}"
        claim = self._config.cluster.reward_placement
        place = Place(name, claim, num_ranks=num_ranks, strategy=claim.strategy)

        def create() -> Sequence[ActorHandle]:
            worker = ray.remote(RewardWorker)
            followers = [
                worker.options(
                    **self._options(f"{name}.rank{rank}", claim) | place.options(rank)
                ).remote(context, name=name, rank=rank, num_ranks=num_ranks)
                for rank in range(1, num_ranks)
            ]
            options = self._options(name, claim) | place.options(0)
            leader = worker.options(**options | {"max_concurrency": _REPLICA_CONCURRENCY}).remote(
                context, name=name, rank=0, num_ranks=num_ranks, peers=tuple(followers)
            )
            return [leader, *followers]

        return Launch(place, create)

    def learner(self, context: RunContext, *, incarnation: int) -> Launch:
        """The ranks of the learner."""
        num_ranks = self._config.learner.ranks
        name = f"learner.{incarnation}"
        claim = self._config.cluster.learner_placement
        place = Place(name, claim, num_ranks=num_ranks, strategy=claim.strategy)

        def create() -> Sequence[ActorHandle]:
            worker = ray.remote(LearnerWorker)
            return [
                worker.options(
                    **self._options(f"{name}.rank{rank}", claim) | place.options(rank)
                ).remote(context, name="learner", rank=rank, num_ranks=num_ranks)
                for rank in range(num_ranks)
            ]

        return Launch(place, create)

    def evaluator(self, context: RunContext, *, name: str) -> ActorHandle:
        """A process that evaluates and then goes."""
        return (
            ray.remote(EvaluationWorker)
            .options(**self._options(name, self._config.cluster.actor_placement))
            .remote(context, name=name)
        )

    def _options(self, name: str, place: Placement) -> dict[str, Any]:
        return {
            "name": name,
            "namespace": self._namespace,
            "num_cpus": place.cpus,
            "num_gpus": place.gpus,
            "max_concurrency": _CONTROL_CONCURRENCY,
            "runtime_env": {"env_vars": process_environment(place.threads)},
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

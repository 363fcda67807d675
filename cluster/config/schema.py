"""The configuration of a run: one section for each room, and what only the whole run has.

Imports no torch, so that a mistake in a file is reported at once.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.config import ActorConfig
from buffer.config import BufferConfig
from cluster.config.em import EMConfig
from learner.config import LearnerConfig
from lm.config import LMConfig, LoRAConfig
from reward.config import RewardConfig
from tasks.config import EM_TASKS, SENTENCE_TASKS, TaskConfig
from tasks.evaluation.config import EvaluationConfig
from tasks.posterior.config import PosteriorConfig


class Placement(BaseModel):
    """What one process claims of its node."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpus: float = Field(default=0.25, ge=0, description="Ray CPUs; how many fit on a node.")
    gpus: float = Field(default=0.0, ge=0, description="Ray GPUs; a fraction shares one.")
    threads: int = Field(default=1, ge=1, description="Threads of its matrix products.")

    @model_validator(mode="after")
    def _check_claim(self) -> Self:
        if self.cpus == 0 and self.gpus == 0:
            raise ValueError("cpus and gpus are both 0: a place must be a share of something")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus ({self.gpus:g}) must be whole above 1; only one can be shared")
        return self


class GroupPlacement(Placement):
    """What one rank claims, and how the ranks of one worker group lie among the nodes."""

    strategy: Literal["PACK", "STRICT_PACK", "SPREAD"] = Field(
        default="PACK",
        description="Ranks of one worker group: on as few nodes as there is room on, on one node "
        "or not at all, or on as many as there are.",
    )


class ClusterConfig(BaseModel):
    """The `[cluster]` section: how many processes, where, and how long they may be silent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str | None = Field(
        default=None,
        description="A running Ray cluster (host:port, ray://..., auto); None starts one here.",
    )
    cpus: int | None = Field(
        default=None, ge=1, description="CPUs that a Ray started here offers; None: its cores."
    )
    dashboard: bool = Field(default=False, description="Start Ray's dashboard, on loopback.")
    actors: int = Field(default=2, ge=1, description="Rollout actors.")
    actor_placement: Placement = Placement()
    reward_placement: GroupPlacement = GroupPlacement()
    learner_placement: GroupPlacement = GroupPlacement()
    time_limit_s: float | None = Field(
        default=None, gt=0, description="Training ends after this time even if steps are left."
    )
    max_restarts: int = Field(
        default=5, ge=0, description="Times that one part may die and be replaced."
    )
    start_timeout_s: float = Field(
        default=300.0,
        gt=0,
        description="Longest wait of one part for a place on the cluster, and then longest start. "
        "Who needs it waits longer by both.",
    )
    silence_timeout_s: float = Field(
        default=120.0, gt=0, description="Longest that a running part may leave a call unanswered."
    )
    answer_timeout_s: float = Field(
        default=30.0, gt=0, description="Longest wait for the weight store or replica registry."
    )
    stop_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="Longest orderly stop, of the run or of a part that is scaled away; what "
        "still runs then is killed.",
    )


class CompareConfig(BaseModel):
    """The `[compare]` section: what `amortize compare` does otherwise than `amortize train`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[str, ...] = Field(
        default=("base", "sft", "ppo", "gflownet"),
        min_length=1,
        description="What is compared, unless --methods says otherwise; docs/compare.md lists all.",
    )
    steps: int | None = Field(
        default=None, gt=0, description="Optimizer steps of every method; None: learner.steps."
    )
    shots: int = Field(
        default=0, ge=0, description="Worked questions in front of each, for method base."
    )
    overrides: dict[str, tuple[str, ...]] = Field(
        default={},
        description="Of a method alone, such as ppo = ['learner.learning_rate=3e-4']: what a fair "
        "comparison must tune.",
    )


class SimulationConfig(BaseModel):
    """The `[throughput.simulation]` section: the waits that stand for model compute."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decode_step_ms: float = Field(
        default=50.0, ge=0, description="One decode step of all rows of a batch."
    )
    score_call_ms: float = Field(
        default=60.0, ge=0, description="One call of a reward rank: up to reward.token_budget."
    )
    update_ms: float = Field(default=50.0, ge=0, description="One optimizer step.")
    adapter_mb: float = Field(
        default=4.0, gt=0, description="Megabytes of the adapter that is published."
    )
    balanced_ms: float = Field(
        default=600.0,
        gt=0,
        description="Sampling a batch, scoring it and one optimizer step, each, where synchronous "
        "and asynchronous mode are compared.",
    )


class ThroughputConfig(BaseModel):
    """The `[throughput]` section: how rates are measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    warm_up_batches: int = Field(
        default=2, ge=1, description="Batches of each actor before anything is counted."
    )
    batches: int = Field(default=2, ge=1, description="Batches of each actor in one repeat.")
    repeats: int = Field(
        default=6,
        ge=2,
        description="Repeats; their median counts. Six are the fewest that hold the true median "
        "between them at 95 %.",
    )
    comparison_steps: int = Field(
        default=12, ge=2, description="Optimizer steps counted in each mode that is compared."
    )
    simulation: SimulationConfig = SimulationConfig()


class RunConfig(BaseModel):
    """Everything that fixes a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(default=0, ge=0, description="Of everything random in the run.")
    task: TaskConfig
    lm: LMConfig
    lora: LoRAConfig = LoRAConfig()
    actors: ActorConfig = ActorConfig()
    reward: RewardConfig = RewardConfig()
    buffer: BufferConfig = BufferConfig()
    learner: LearnerConfig
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    posterior: PosteriorConfig = PosteriorConfig()
    compare: CompareConfig = CompareConfig()
    em: EMConfig = EMConfig()
    throughput: ThroughputConfig = ThroughputConfig()

    @property
    def task_name(self) -> str:
        """The task's name as a file may bear it: of a user's own, the class alone."""
        return self.task.name.rpartition(":")[2]

    @property
    def rollout_actors(self) -> int:
        """Actors that the run needs: none where it imitates."""
        return 0 if self.learner.imitates else self.cluster.actors

    @property
    def reward_replicas(self) -> int:
        """Replicas that the run needs: none where the task's reward is a function of its own, or
        nobody asks for rewards."""
        unasked = self.task.reward_kind == "function" or self.learner.imitates
        return 0 if unasked else self.reward.replicas

    def with_parts(self, *, actors: int, replicas: int) -> "RunConfig":
        """The same run with other numbers of rollout actors and reward replicas."""
        cluster = self.cluster.model_copy(update={"actors": actors})
        reward = self.reward.model_copy(update={"replicas": replicas})
        return self.model_copy(update={"cluster": cluster, "reward": reward})

    def with_model(self, folder: Path) -> "RunConfig":
        """The same run of another language model."""
        lm = self.lm.model_copy(update={"model": str(folder)})
        return self.model_copy(update={"lm": lm})

    @property
    def max_lag_versions(self) -> int:
        """How far behind the newest published version an actor may sample and still be drawn."""
        return self.buffer.max_age - (self.learner.publish_every_steps - 1)

    @model_validator(mode="after")
    def _check_on_policy(self) -> "RunConfig":
        if self.learner.objective != "ppo":
            return self
        replayed, share = self.learner.replayed_per_group, self.actors.on_policy_share
        if replayed or share != 1:
            raise ValueError(
                f'learner.objective "ppo" learns from the policy\'s own samples: set '
                f"learner.replayed_per_group ({replayed}) to 0 and actors.on_policy_share "
                f"({share:.3g}) to 1"
            )
        return self

    @model_validator(mode="after")
    def _check_decoding(self) -> "RunConfig":
        asked = self.evaluation
        plain = asked.decoding == "sample" and asked.top_p == 1 and asked.candidates == 1
        if not plain and not (self.task.name in SENTENCE_TASKS and self.task.tests):
            raise ValueError(
                f'evaluation.decoding "{asked.decoding}" with top_p {asked.top_p:g} and candidates '
                f'{asked.candidates} is for sentences, and task "{self.task.name}" with '
                f"{len(self.task.tests)} test files writes none: leave these out, or evaluate a "
                f"task of {', '.join(SENTENCE_TASKS)} on task.tests"
            )
        return self

    @model_validator(mode="after")
    def _check_m_step(self) -> "RunConfig":
        if self.learner.objective != "joint":
            return self
        if self.task.name not in EM_TASKS:
            raise ValueError(
                f'learner.objective "joint" is the M-step of EM, and task "{self.task.name}" has '
                f"none: tasks with EM are {', '.join(EM_TASKS)}"
            )
        if self.em.policy is None:
            raise ValueError(
                'learner.objective "joint" draws rationales of a policy: name the folder of its '
                "adapter in em.policy, such as runs/NAME/adapter"
            )
        return self

    @model_validator(mode="after")
    def _check_lag(self) -> "RunConfig":
        if self.actors.lag_versions > max(self.max_lag_versions, 0):
            raise ValueError(
                f"actors.lag_versions ({self.actors.lag_versions}) must not exceed buffer.max_age "
                f"({self.buffer.max_age}) less the versions between two publications "
                f"({self.learner.publish_every_steps - 1}): the buffer would drop everything"
            )
        return self

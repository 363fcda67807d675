"""The configuration of a run: one section for each room, and what only the whole run has.

Imports no torch, so that a mistake in a file is reported at once.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.config import ActorConfig
from buffer.config import BufferConfig
from cluster.config.experiments import CompareConfig, EMConfig, ThroughputConfig
from cluster.config.placement import ClusterConfig
from cluster.config.validation import set_key, validated
from learner.config import LearnerConfig
from lm.config import LMConfig, LoRAConfig
from reward.config import RewardConfig
from tasks.config import EM_TASKS, SENTENCE_TASKS, TaskConfig
from tasks.evaluation.config import EvaluationConfig
from tasks.posterior.config import PosteriorConfig


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
        return 0 if self.learner.traits.imitates else self.cluster.actors

    @property
    def reward_replicas(self) -> int:
        """Replicas that the run needs: none where the task's reward is a function of its own, or
        nobody asks for rewards."""
        unasked = self.task.reward_kind == "function" or self.learner.traits.imitates
        return 0 if unasked else self.reward.replicas

    def changed(self, changes: Mapping[str, Any]) -> "RunConfig":
        """This configuration with other values, by dotted key; the result is checked as a whole.

        The one way to change a configuration. Raises ConfigError: an unknown key or a bad value.
        """
        table = dict(self)
        for key, value in changes.items():
            set_key(table, key, value)
        return validated(RunConfig, table)

    @property
    def max_lag_versions(self) -> int:
        """How far behind the newest published version an actor may sample and still be drawn."""
        return self.buffer.max_age - (self.learner.publish_every_steps - 1)

    @model_validator(mode="after")
    def _check_on_policy(self) -> "RunConfig":
        if not self.learner.traits.on_policy:
            return self
        replayed, share = self.learner.replayed_per_group, self.actors.on_policy_share
        name = self.learner.objective
        if replayed or share != 1:
            raise ValueError(
                f'learner.objective "{name}" learns from the policy\'s own samples: '
                f"set learner.replayed_per_group ({replayed}) to 0 and actors.on_policy_share "
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
        if not self.learner.traits.trains_model:
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
    def _check_a_step_can_be_made(self) -> "RunConfig":
        """Refuse what would roll out for ever: the learner would never have its groups."""
        if self.learner.traits.imitates:
            return self
        needed, age = self.learner.groups_per_step, self.buffer.max_age
        for name, most in (
            ("buffer.fresh_capacity", self.buffer.fresh_capacity),
            ("actors.max_ready_groups", self.actors.max_ready_groups),
        ):
            if most < needed:
                raise ValueError(
                    f"learner.groups_per_step ({needed}) groups never wait at once where {name} is "
                    f"{most}: raise the latter, or lower the former"
                )
        if self.max_lag_versions < 0:
            raise ValueError(
                f"learner.publish_every_steps ({self.learner.publish_every_steps}) leaves actors "
                f"further behind than buffer.max_age ({age}) versions, and the buffer drops what "
                "they sample: publish more often, or raise the latter"
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

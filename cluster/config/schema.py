"""The configuration of a run: one section for each room, and what only the whole run has.

Imports no torch, so that a mistake in a file is reported at once.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from actors.config import ActorConfig
from buffer.config import BufferConfig
from cluster.config.experiments import CompareConfig, EMConfig, ThroughputConfig
from cluster.config.placement import ClusterConfig
from cluster.config.tracking import TrackingConfig
from cluster.config.validation import set_key, validated
from learner.config import LearnerConfig
from lm.config import Frozen, LMConfig, LoRAConfig
from reward.config import RewardConfig
from tasks.config import EM_TASKS, SENTENCE_TASKS, QuestionsConfig, SubjectivityConfig, TaskConfig
from tasks.evaluation.config import EvaluationConfig, PosteriorConfig


class RunConfig(Frozen):
    """Everything that fixes a run."""

    seed: int = Field(0, ge=0, description="Of everything random in the run.")
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
    tracking: TrackingConfig = TrackingConfig()
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
        """Replicas that the run needs: none where nobody asks them for rewards."""
        unasked = self.task.reward_kind == "function" or self.learner.traits.imitates
        return 0 if unasked else self.reward.replicas

    def changed(self, changes: Mapping[str, Any]) -> "RunConfig":
        """With other values, by dotted key; raises ConfigError. The one way to change a run's."""
        table = dict(self)
        for key, value in changes.items():
            set_key(table, key, value)
        return validated(RunConfig, table)

    @property
    def max_lag_versions(self) -> int:
        """How far behind the newest published version an actor may sample and still be drawn."""
        return self.buffer.max_age - (self.learner.publish_every_steps - 1)

    @model_validator(mode="after")
    def _check_sections_together(self) -> Self:
        if (mistake := next(self._contradictions(), None)) is not None:
            raise ValueError(mistake)
        return self

    def _contradictions(self) -> Iterator[str]:
        """What no section can see by itself."""
        traits, name = self.learner.traits, self.learner.objective
        replayed, share = self.learner.replayed_per_group, self.actors.on_policy_share
        if traits.on_policy and (replayed or share != 1):
            yield (
                f'learner.objective "{name}" learns from the policy\'s own samples: '
                f"set learner.replayed_per_group ({replayed}) to 0 and actors.on_policy_share "
                f"({share:.3g}) to 1"
            )
        asked, task = self.evaluation, self.task
        plain = asked.decoding == "sample" and asked.top_p == 1 and asked.candidates == 1
        if not plain and not (task.name in SENTENCE_TASKS and task.tests):
            yield (
                f'evaluation.decoding "{asked.decoding}" with top_p {asked.top_p:g} and candidates '
                f'{asked.candidates} is for sentences, and task "{task.name}" with '
                f"{len(task.tests)} test files writes none: leave these out, or evaluate a "
                f"task of {', '.join(SENTENCE_TASKS)} on task.tests"
            )
        if traits.trains_model and task.name not in EM_TASKS:
            yield (
                f'learner.objective "joint" is the M-step of EM, and task "{task.name}" has '
                f"none: tasks with EM are {', '.join(EM_TASKS)}"
            )
        if traits.trains_model and self.em.policy is None:
            yield (
                'learner.objective "joint" draws rationales of a policy: name the folder of its '
                "adapter in em.policy, such as runs/NAME/adapter"
            )
        if self.actors.engine == "vllm" and self.buffer.kind == "memory":
            yield (
                'buffer.kind "memory" is for runs that go on bit for bit, and vLLM does not draw '
                'the same twice: set actors.engine to "native", or leave buffer.kind out'
            )
        yield from () if traits.imitates else self._starvation()
        yield from self._mistaken_terms()
        if self.actors.lag_versions > max(self.max_lag_versions, 0):
            yield (
                f"actors.lag_versions ({self.actors.lag_versions}) must not exceed buffer.max_age "
                f"({self.buffer.max_age}) less the versions between two publications "
                f"({self.learner.publish_every_steps - 1}): the buffer would drop everything"
            )

    def _mistaken_terms(self) -> Iterator[str]:
        """Of the reward: where nothing is to be added to, and where R is wanted and not known."""
        terms, name = self.reward.terms, self.learner.objective
        if terms and self.task.reward_kind == "function":
            yield (
                f'reward.terms add to what the language model says, and task "{self.task.name}" '
                "asks none: leave them out, and say it in the task's own reward"
            )
        if self.learner.traits.has_terms and any(term.where == "end" for term in terms):
            yield (
                f'reward.terms: where = "end" judges whole completions alone, and '
                f'learner.objective "{name}" learns from every stop state: set it to "tb" or '
                '"ppo", or where to "every"'
            )
        judged = any(term.kind == "verifier" for term in terms)
        task = self.task
        if judged and isinstance(task, SubjectivityConfig) and task.wrong_label_penalty:
            yield (
                "task.wrong_label_penalty compares what the language model alone says of two "
                "labels, and reward.terms have a verifier: leave one of them out"
            )
        if isinstance(self.task, QuestionsConfig) and not (self.task.y or judged):
            yield (
                'task.y is "" and reward.terms have no verifier: nothing tells a good rationale '
                "from another, so give one of them"
            )

    def _starvation(self) -> Iterator[str]:
        """What would roll out for ever: the learner would never have its groups."""
        needed = self.learner.groups_per_step
        for name, most in (
            ("buffer.fresh_capacity", self.buffer.fresh_capacity),
            ("actors.max_ready_groups", self.actors.max_ready_groups),
        ):
            if most < needed:
                yield (
                    f"learner.groups_per_step ({needed}) groups never wait at once where {name} is "
                    f"{most}: raise the latter, or lower the former"
                )
        if self.max_lag_versions < 0:
            yield (
                f"learner.publish_every_steps ({self.learner.publish_every_steps}) leaves actors "
                f"further behind than buffer.max_age ({self.buffer.max_age}) versions, and the "
                "buffer drops what they sample: publish more often, or raise the latter"
            )

"""What a learner imitates that asks no actor for trajectories.

sft    the task's demonstrations Z; of a task that has answers instead, Y behind X as the
       language model would write it
joint  Z Y behind X, with Z ~ q(Z | X) of another run's policy: the M-step of EM
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.demonstrations import Demonstration, tell_faults, unscored_demonstrations
from buffer.replay import DrawRequest, Group, Replay
from buffer.trajectory import Trajectory
from cluster.config.schema import RunConfig
from cluster.run.evaluation import evaluation_context
from learner.demonstrations import DemonstrationDraws
from learner.learner import StoppedWaiting
from learner.objectives.base import Objective
from learner.objectives.likelihood import MaximumLikelihood, TextLikelihood
from lm.actions import ActionSpace
from lm.model import LanguageModel, context_limit
from lm.tools import ToolFault
from tasks.stop_rule import any_text
from tasks.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What is drawn, the actions under which it has its probability, and the loss."""

    replay: Replay
    actions: ActionSpace
    objective: Objective


def imitation(config: RunConfig, base: LanguageModel, task: Task) -> Learned:
    """Of `learner.objective`, which is one that imitates.

    Raises NoDemonstrations, IllegalCompletion, or TokenizerUnfit without an end-of-text token.
    """
    if config.learner.traits.trains_model:
        actions = any_text(base.tokenizer, min_len=0, max_len=context_limit(base.model))

        def make(stop: Callable[[], bool]) -> Replay:
            return _draws(config, task, list(rationales(config, task, stop)), actions)

        later = LaterDraws(make)
        return Learned(replay=later, actions=actions, objective=TextLikelihood())
    if task.answered:
        actions = any_text(base.tokenizer, min_len=0, max_len=context_limit(base.model))
        draws = _draws(config, task, task.answered, actions)
        return Learned(replay=draws, actions=actions, objective=TextLikelihood())
    draws = _draws(config, task, task.demonstrations, task.actions)
    return Learned(replay=draws, actions=task.actions, objective=MaximumLikelihood())


def learns_texts(config: RunConfig, task: Task) -> bool:
    """Whether the run learns whole texts, which any token may continue, rather than Z alone."""
    traits = config.learner.traits
    return traits.trains_model or (traits.imitates and bool(task.answered))


def rationales(
    config: RunConfig, task: Task, stop: Callable[[], bool] = lambda: False
) -> Iterator[Demonstration]:
    """Texts Z Y behind X as the frozen LM reads it: `em.rationales` for every prompt of the task.

    Z is drawn at temperature 1 from the policy in `em.policy`, a function of `seed`.

    What a tool ended twice is left out; raises what it raised where it ended all, or too many in a
    row. Raises FileNotFoundError, AdapterMismatch: no policy there, or one of another LM; and
    StoppedWaiting once `stop()` holds.
    """

    def heed(stage: str) -> None:
        if stop():
            raise StoppedWaiting(f"the learner was stopped while it drew rationales: {stage}")

    number, context = config.em.rationales, task.reward_query.context
    policy = evaluation_context(config, Path(str(config.em.policy)), progress=heed)
    shown = [prompt.prompt for prompt in task.prompts]
    drawn = policy.attempt(task.actions, shown, number, tool=task.tool, seed=config.seed)
    asked = [(prompt, z) for prompt, same in zip(task.prompts, drawn, strict=True) for z in same]
    tell_faults([z for _, z in asked], "rationales")
    for prompt, completion in asked:
        if isinstance(completion, ToolFault):
            continue
        text = (*completion.tokens.tolist(), *prompt.answer)
        yield Demonstration(
            prompt=dataclasses.replace(prompt, prompt=(*context, *prompt.scored_prompt)),
            completion=text,
            from_tool=(False,) * len(text),  # what a tool says is part of p(Z Y | X)
        )


class LaterDraws:
    """A `Replay` that is made with the first draw: by rank 0 alone, when the run is up."""

    def __init__(self, make: Callable[[Callable[[], bool]], Replay]) -> None:
        """`make` is told how to ask whether to stop, and raises StoppedWaiting then."""
        self._make = make
        self._made: Replay | None = None

    def draw(self, request: DrawRequest) -> list[Group]:
        if self._made is None:
            try:
                self._made = self._make(request.stop)
            except StoppedWaiting:
                return []
        return self._made.draw(request)

    def discard(self, trajectories: Sequence[Trajectory]) -> None:
        """Nothing disagrees with a text: no policy sampled it."""


def _draws(
    config: RunConfig, task: Task, shown: Sequence[Demonstration], actions: ActionSpace
) -> DemonstrationDraws:
    """As many at a time as another objective has trajectories."""
    trajectories = unscored_demonstrations(
        shown, task=task.name, actions=actions, is_correct=lambda prompt, completion: None
    )
    rows_per_group = config.actors.group_size + config.learner.replayed_per_group
    return DemonstrationDraws(trajectories, rows=config.learner.groups_per_step * rows_per_group)

"""What a user's own task is made from: a class of settings that builds the task."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

from actors.prompts import Prompt
from actors.reward_query import RewardKind
from reward.checks import misfit
from tasks.custom_config import CustomTaskConfig
from tasks.evaluation.accuracy import evaluate_answers
from tasks.evaluation.context import EvaluationContext
from tasks.evaluation.evaluation import Evaluation
from tasks.held_out import check_split
from tasks.posterior.assessment import evaluate_posterior
from tasks.task import QuestionTask, Task, Tokenizer


class CustomTask(CustomTaskConfig):
    """The `[task]` section of a run on a user's own task; a subclass adds fields as keys.

    `reward_kind`, a class variable, is the kind of the task's RewardQuery: "suffix" if not set.
    """

    @abstractmethod
    def build(self, tokenizer: Tokenizer) -> Task:
        """The task in the tokens of `tokenizer`; each process of a run builds it anew.

        It may raise DataError and TokenizerUnfit, which are shown without a traceback.
        """


class PlainTask(Task):
    """A task of which only the necessary is said."""

    def evaluate(self, context: EvaluationContext) -> Evaluation:
        """On what is held out where something is, else by the distance to the posterior."""
        check_split(self.name, self.held_out, context.split)
        if self.held_out.get(context.split):
            return self.evaluate_held_out(context)
        return evaluate_posterior(self, context)

    def evaluate_held_out(self, context: EvaluationContext) -> Evaluation:
        """Answers to questions are counted; a task without questions measures otherwise."""
        assert isinstance(self, QuestionTask), f"{type(self).__name__} cannot measure test files"
        return evaluate_answers(self, context)


class UnfitTask(ValueError):
    """A user's task that no run could work on."""


def build_own(config: CustomTask, tokenizer: Tokenizer) -> Task:
    """The task, once it has passed for one.

    Raises:
        UnfitTask: it lacks something, or contradicts its settings.
    """
    if fault := misfit(config.build, ("tokenizer",)):
        raise UnfitTask(f"task {config.name}: build: {fault}")
    task = config.build(tokenizer)
    if fault := _fault(config, task):
        raise UnfitTask(f"task {config.name}: {fault}")
    return task


def _fault(config: CustomTask, task: Task) -> str:
    """What is wrong and what to do; empty where nothing is."""
    if not isinstance(task, Task):
        return f"build() returns {task!r:.60}, which is no Task: make a tasks.custom.PlainTask"
    kind = task.reward_query.kind
    if config.reward_kind != kind:
        return f"its reward_query is of kind {kind!r}: set the class's reward_kind to that"
    if (kind == "function") != (task.log_reward is not None):
        return "a log_reward goes with reward_kind 'function', and with no other"
    if not task.prompts:
        return "it has no prompts: give one at least"
    for name, function, given in _called(task):
        if fault := misfit(function, given):
            return f"{name}: {fault}"
    if any(task.held_out.values()) and not _measures(task):
        return (
            "it holds out data, and says neither what an answer is nor how else to measure: derive "
            "it from tasks.task.QuestionTask too, or define evaluate_held_out"
        )
    if config.tests and not task.held_out.get("test"):
        return "it holds out no test data (PlainTask.held_out): leave task.tests and --data out"
    if (config.validation or config.validation_share) and not task.held_out.get("validation"):
        return "it holds out no validation data: leave task.validation and validation_share out"
    return _prompt_fault(task.prompts, kind)


def _called(task: Task) -> Iterator[tuple[str, object, tuple[str, ...]]]:
    """What a run calls of a task: by which name, and with which arguments."""
    yield "verdict", task.verdict, ("prompt", "completion")
    yield "valid", task.valid, ("completion",)
    yield "check_evaluation", task.check_evaluation, ("split",)
    yield "evaluate", task.evaluate, ("context",)
    if task.log_reward is not None:
        yield "log_reward", task.log_reward, ("item",)
    if task.tool is not None:
        yield "tool.output", task.tool.output, ("completion",)
    if isinstance(task, QuestionTask):
        yield "parse_answer", task.parse_answer, ("text",)
    if isinstance(task, PlainTask):
        yield "evaluate_held_out", task.evaluate_held_out, ("context",)


def _measures(task: Task) -> bool:
    """Whether it can measure what it holds out."""
    if not isinstance(task, PlainTask) or isinstance(task, QuestionTask):
        return True
    own = type(task)
    inherited = own.evaluate is PlainTask.evaluate
    return not (inherited and own.evaluate_held_out is PlainTask.evaluate_held_out)


def _prompt_fault(prompts: Sequence[Prompt], kind: RewardKind) -> str:
    seen: set[str] = set()
    for prompt in prompts:
        named = f"prompt {prompt.text!r}"
        if prompt.key in seen:
            return f"{named} has the key {prompt.key!r} of another one: keys must differ"
        seen.add(prompt.key)
        if not (prompt.prompt and prompt.scored_prompt):
            return f"{named} has no tokens: give it one at least"
        if kind == "suffix" and not prompt.answer:
            return f"{named} has no answer, which the reward 'suffix' scores: give it one"
    return ""

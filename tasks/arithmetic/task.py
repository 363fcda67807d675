"""Sums and differences of one-digit operands, worked out in steps with a calculator.

X 'Question: 6 - 0 - 4 = ? Answer:', Z ' 6 - 0 = 6, 6 - 4 = 2' (results inserted by the
calculator), Y '. The answer is 2.' (Hu et al. 2024, section 4.4). The policy stops by the token
'.', the first of Y, so an untrained policy stops where the language model would.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from actors.demonstrations import Demonstration
from actors.prompts import Prompt
from actors.reward_query import RewardQuery
from lm.actions import ActionSpace
from lm.spelling import check_spelling, spell, spell_after
from tasks.arithmetic.calculator import Calculator
from tasks.arithmetic.data import Item, load_demonstrations, load_items
from tasks.arithmetic.expression import ANSWER_LEAD, answer_text
from tasks.config import ArithmeticConfig
from tasks.custom import PlainTask
from tasks.evaluation.accuracy import evaluate_answers
from tasks.evaluation.context import EvaluationContext
from tasks.evaluation.evaluation import Evaluation
from tasks.held_out import read_splits
from tasks.stop_rule import any_text, legal_actions
from tasks.task import QuestionTask, TestQuestion, Tokenizer

STOP_TEXT = "."
LONGEST_ANSWER = -9999  # no sum of a readable rationale takes more characters
LEGAL_CHARACTERS = frozenset("0123456789+-=, ")
_STEP = " 1 + 1 = 2"  # what an answer stands behind, as far as that matters to its spelling
_LAST_RESULT = re.compile(r"= (-?[0-9]+)$")
_ANSWER = re.compile(r" ?(-?[0-9]+)\.")


@dataclass(frozen=True, kw_only=True)
class Arithmetic(PlainTask, QuestionTask):
    """The task on loaded data; see tasks.task.QuestionTask."""

    tokenizer: Tokenizer
    tool: Calculator

    def verdict(self, prompt: Prompt, completion: Sequence[int]) -> bool:
        """Whether the last step's result is the answer of the prompt."""
        result = _LAST_RESULT.search(self.tokenizer.decode(list(completion)))
        said = self.tokenizer.decode(list(prompt.answer))
        answer = self.parse_answer(said.removeprefix(ANSWER_LEAD))
        return result is not None and int(result[1]) == answer

    def parse_answer(self, text: str) -> int | None:
        """The number in ' -6.', said behind '. The answer is'; None for anything else."""
        match = _ANSWER.match(text)
        return None if match is None else int(match[1])

    def evaluate_held_out(self, context: EvaluationContext) -> Evaluation:
        """Answers to held-out questions, by number of operands.

        The base LM is given the words that an answer begins with: behind a whole rationale a small
        one would rather calculate on.
        """
        lead = spell_after(self.tokenizer, _STEP, ANSWER_LEAD)
        return evaluate_answers(self, context, groups="operands", lead=lead)


def build_arithmetic(config: ArithmeticConfig, tokenizer: Tokenizer) -> Arithmetic:
    """Load the data and encode it; raises DataError, TokenizerUnfit."""
    worked = load_demonstrations(config.demonstrations)
    if config.reward_demonstrations > len(worked):
        raise ValueError(
            f"reward_demonstrations is {config.reward_demonstrations}, but "
            f"{config.demonstrations} holds {len(worked)}"
        )
    tool = Calculator(tokenizer)
    actions = build_actions(tokenizer, config)
    shown = {item.expression for item in worked}
    others = [item for item in load_items(config.questions) if item.expression not in shown]
    splits = read_splits(config, others, load_items, lambda item: item.expression.question)
    questions = [(item, config.demonstration_weight) for item in worked]
    questions += [(item, config.question_weight) for item in splits.training]
    # A few numbers are the answers of all questions.
    answer_of = cache(lambda number: spell_after(tokenizer, _STEP, answer_text(number)))
    prompts: dict[str, Prompt] = {}
    for item, weight in questions:  # a question that comes again counts where it came first
        prompts.setdefault(
            item.expression.text, _prompt(item, weight, tokenizer, answer_of(item.answer))
        )

    def test_question(item: Item) -> TestQuestion:
        return TestQuestion(
            prompt=_prompt(item, 1.0, tokenizer, answer_of(item.answer)),
            answer=item.answer,
            group=str(len(item.expression.operands)),
            unseen=item.expression.text not in prompts,
        )

    return Arithmetic(
        name="arithmetic",
        tokenizer=tokenizer,
        actions=actions,
        answer_actions=build_answer_actions(tokenizer),
        tool=tool,
        prompts=tuple(prompts.values()),
        demonstrations=tuple(
            demonstrate(prompts[item.expression.text], item.steps or (), tokenizer, tool)
            for item in worked
        ),
        held_out=splits.made(test_question),
        reward_query=RewardQuery(
            kind="suffix",
            stop_token=actions.stop_token,
            context=_reward_context(worked[: config.reward_demonstrations], tokenizer),
        ),
    )


def build_actions(tokenizer: Tokenizer, config: ArithmeticConfig) -> ActionSpace:
    """All tokens that spell digits, signs, commas and spaces; raises TokenizerUnfit."""
    return legal_actions(
        tokenizer,
        config,
        LEGAL_CHARACTERS.issuperset,
        behind=_STEP,
        stop_text=STOP_TEXT,
        stop_after_tool=config.stop_after_tool,
    )


def build_answer_actions(tokenizer: Tokenizer) -> ActionSpace:
    """Any text as long as an answer's number can be; raises TokenizerUnfit."""
    longest = spell_after(tokenizer, ANSWER_LEAD, f" {LONGEST_ANSWER}.")
    return any_text(tokenizer, min_len=1, max_len=len(longest))


def demonstrate(
    prompt: Prompt, steps: Sequence[str], tokenizer: Tokenizer, tool: Calculator
) -> Demonstration:
    """The rationale as the policy would sample it: the calculator speaks behind every '='.

    Raises TokenizerUnfit where the pieces do not split as the whole text does.
    """
    tokens: list[int] = []
    from_tool: list[bool] = []
    for number, step in enumerate(steps):
        said = prompt.text + tokenizer.decode(tokens)
        tokens += spell_after(tokenizer, said, f", {step}" if number else f" {step}")
        output = tool.output(tokens)
        from_tool += [False] * (len(tokens) - len(from_tool)) + [True] * len(output)
        tokens += output
    text = tokenizer.decode(tokens)
    answer = tokenizer.decode(list(prompt.answer))
    pieces = [(prompt.text, prompt.prompt), (text, tuple(tokens)), (answer, prompt.answer)]
    check_spelling(tokenizer, pieces)
    return Demonstration(prompt=prompt, completion=tuple(tokens), from_tool=tuple(from_tool))


def _prompt(item: Item, weight: float, tokenizer: Tokenizer, answer: tuple[int, ...]) -> Prompt:
    return Prompt(
        key=item.expression.text,
        text=item.expression.question,
        prompt=spell(tokenizer, item.expression.question),
        answer=answer,
        weight=weight,
    )


def _reward_context(worked: Sequence[Item], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Worked questions as the corpus writes them, a line each."""
    lines = [
        f"{item.expression.question} {', '.join(step.text for step in item.expression.steps)}"
        f"{answer_text(item.answer)}\n"
        for item in worked
    ]
    return spell(tokenizer, "".join(lines))

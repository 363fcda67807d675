"""Questions with answers, of any origin: X asks, Z is a rationale, Y the true answer.

    Question: What is 3 + 4?
    Reasoning: 3 + 4 = 7
    Answer: 7

Both texts are templates (`task.x`, `task.y`). The policy ends Z by the token that Y begins with,
so an untrained one stops where the language model would; without a Y by the end-of-text token.
"""

import re
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import attrgetter

from actors.demonstrations import Demonstration
from actors.prompts import Prompt, key_of
from actors.reward_query import RewardQuery
from lm.actions import ActionSpace
from lm.hub import ask_hub
from lm.sampling import Completion
from lm.spelling import ANY_WORD, TokenizerUnfit, chat_text, control_tokens, spell, spell_after
from lm.tools import Tool, ToolFault, insertion
from reward.checks import canonical
from reward.terms import RewardTerms
from tasks.arithmetic.calculator import Calculator, FunctionTool
from tasks.config import QuestionsConfig
from tasks.custom import PlainTask
from tasks.evaluation.accuracy import evaluate_answers, lost
from tasks.evaluation.context import EvaluationContext
from tasks.evaluation.evaluation import Evaluation, Example, Metric
from tasks.held_out import Split, check_apart, read_splits
from tasks.questions.data import Question, read_questions, texts_of
from tasks.records import dataset_name
from tasks.stop_rule import any_text, end_of_text, narrowed
from tasks.task import QuestionTask, TestQuestion, Tokenizer

_LONGER = 8  # tokens by which an answer may be longer than any that is known
_MARK = "\0"  # stands for the answer in Y


@dataclass(frozen=True, slots=True)
class _Asked:
    """A row in the tokens of a model."""

    prompt: Prompt
    answer: str
    shown: Demonstration | None  # where the row has a rationale


@dataclass(frozen=True, kw_only=True)
class Questions(PlainTask, QuestionTask):
    """The task on loaded data; see tasks.task.QuestionTask."""

    tokenizer: Tokenizer
    lead: tuple[int, ...]  # tokens that every Y begins with
    end: str  # text behind the answer in every Y

    def parse_answer(self, text: str) -> str | None:
        """The answer in what the base LM wrote behind X Z and the beginning of Y: its line, or what
        comes before the end of Y."""
        line = text.lstrip().partition("\n")[0]
        behind = rf"{re.escape(self.end.strip())}(?!\S)" if self.end.strip() else "$"
        return canonical(re.split(behind, line)[0]) or None

    def check_evaluation(self, split: Split = "test") -> None:
        """See tasks.task.Task; raises UnusableCheck for a tool that is not there."""
        super().check_evaluation(split)
        if isinstance(self.tool, FunctionTool):
            self.tool.check()

    def evaluate_held_out(self, context: EvaluationContext) -> Evaluation:
        """Where there is a Y, the base LM goes on behind X Z and its beginning, and what it answers
        is counted; where there are verifiers, they judge rationales."""
        if self.reward_query.kind == "suffix":
            found = evaluate_answers(self, context, lead=self.lead)
        else:
            found = Evaluation(task=self.name, temperature=context.temperature, metrics={})
        if context.terms is None or not context.terms.verifiers:
            return found
        metrics, examples, note = self._judged(context, context.terms)
        return found.with_metrics(metrics).model_copy(
            update={
                "examples": found.examples or examples,
                "note": "; ".join(filter(None, (found.note, note))),
            }
        )

    def _judged(
        self, context: EvaluationContext, terms: RewardTerms
    ) -> tuple[dict[str, Metric], tuple[Example, ...], str]:
        """Mean scores of rationales by each verifier, the first of some questions, and a note."""
        items, number = context.items(self.held_out), context.settings.samples
        context.progress(f"judging {number} rationales for each of {len(items)} questions")
        asked = [item.prompt.prompt for item in items]
        heat = context.settings.temperature
        drawn = context.attempt(self.actions, asked, number, tool=self.tool, temperature=heat)
        whole = {
            (place, at): self.reward_query.item(items[place].prompt, z.tokens, z.stops[-1:])
            for place, same in enumerate(drawn)
            for at, z in enumerate(same)
            if isinstance(z, Completion)  # of what a tool ended there is no score
        }
        scores = dict(zip(whole, terms.scores(list(whole.values())), strict=True))
        unknown: list[float | None] = [None] * len(terms.verifiers)
        scores_NV = [
            scores.get((place, at), unknown)
            for place, same in enumerate(drawn)
            for at in range(len(same))
        ]
        mean = partial(Metric.mean, items=len(items), samples=number, shown="chart")
        metrics = {}
        for place, term in enumerate(terms.verifiers):
            scores_N = [scores_V[place] for scores_V in scores_NV]
            metrics[f"verified {place}"] = mean(f"score of verifier {term.check}", scores_N)
        first = zip(items, drawn, scores_NV[::number], strict=True)
        examples = tuple(
            Example(
                question=item.prompt.text,
                rationale=self._text(same[0]),
                answer="" if scores_V[0] is None else f"score {scores_V[0]:g}",
                truth=str(item.answer),
                right=scores_V[0] == 1,
            )
            for item, same, scores_V in islice(first, context.settings.examples)
        )
        return metrics, examples, lost(drawn)

    def _text(self, drawn: Completion | ToolFault) -> str:
        if isinstance(drawn, ToolFault):
            return drawn.reason
        return self.tokenizer.decode(drawn.tokens.tolist()).strip()


def build_questions(config: QuestionsConfig, tokenizer: Tokenizer) -> Questions:
    """Load the data and encode it; raises DataError, TokenizerUnfit."""
    spelling = _Spelling(config, tokenizer)

    def load(source: str) -> tuple[_Asked, ...]:
        if dataset_name(source):
            ask_hub()
        return read_questions(config, source, spelling.asked)

    text = attrgetter("prompt.text")
    splits = read_splits(config, load(config.data), load, text)
    for split, files in splits.held_out.items():
        key = "task.tests" if split == "test" else "task.validation"
        check_apart(key, files, "task.data", (splits.training,), text)
    known: dict[str, _Asked] = {}
    for asked in splits.training:  # a question that comes again counts once
        known.setdefault(asked.prompt.key, asked)
    longest = max(len(asked.prompt.answer) for asked in known.values())
    actions = spelling.actions
    return Questions(
        name="questions",
        tokenizer=tokenizer,
        actions=actions,
        tool=spelling.tool,
        prompts=tuple(asked.prompt for asked in known.values()),
        demonstrations=tuple(asked.shown for asked in known.values() if asked.shown),
        held_out=splits.made(
            lambda one: TestQuestion(prompt=one.prompt, answer=canonical(one.answer), unseen=True)
        ),
        reward_query=RewardQuery(kind=config.reward_kind, stop_token=actions.stop_token),
        answer_actions=any_text(tokenizer, min_len=1, max_len=longest + _LONGER),
        lead=spelling.lead,
        end=spelling.end,
    )


class _Spelling:
    """The texts of a row in the tokens of a model, as `config` has them."""

    def __init__(self, config: QuestionsConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        in_front, _, self.end = config.y.format_map({"answer": _MARK}).partition(_MARK)
        lead = in_front.rstrip()
        self.lead = spell_after(tokenizer, ANY_WORD, lead) if lead else ()
        if config.chat:
            chat_text(tokenizer, ANY_WORD)  # or raises, once for all rows
        self.tool: Tool | None = None
        for name in config.tools:
            self.tool = Calculator(tokenizer)
            if name != "calculator":
                self.tool = FunctionTool(
                    tokenizer, name, behind=config.tool_behind, deadline_s=config.tool_deadline_s
                )
        self.actions = self._action_space()
        if config.tool_behind is not None:
            self._check_trigger(config.tool_behind)

    def _check_trigger(self, text: str) -> None:
        """Raise TokenizerUnfit for a `task.tool_behind` that the policy never writes."""
        assert self.tool is not None
        chosen = set(self.actions.legal_tokens or ()) - {self.actions.stop_token}
        written = set(text) <= set(self._config.legal or text)
        if not (written and chosen.intersection(self.tool.triggers)):
            raise TokenizerUnfit(
                f"task.tool_behind: no token that this task's policy may choose ends {text!r}, so "
                "the tool would never be called; name a text of legal characters (task.legal) that "
                "is not the one it stops by (task.stop)"
            )

    def asked(self, row: Question) -> _Asked:
        """Raises ValueError for a row that cannot be spelled as the templates have it."""
        x, y = texts_of(self._config, row)
        read = chat_text(self._tokenizer, x) if self._config.chat else x
        answer = spell_after(self._tokenizer, ANY_WORD, y) if y else ()
        if answer[: len(self.lead)] != self.lead:
            raise TokenizerUnfit(
                f"this tokenizer spells the beginning of Y otherwise in front of {row.answer!r}: "
                "put a space or a sign in front of {answer} in task.y"
            )
        prompt = Prompt(
            key=key_of(f"{x}\0{y or row.answer}"),
            text=x,
            prompt=spell(self._tokenizer, read),
            answer=answer,
            record=row.record,
        )
        shown = None if row.rationale is None else self._shown(prompt, read, row.rationale)
        return _Asked(prompt, row.answer, shown)

    def _shown(self, prompt: Prompt, read: str, rationale: str) -> Demonstration:
        """The rationale as the policy would write it, with the marks of what the tool says.

        Raises IllegalCompletion, TokenizerUnfit, and ValueError where the tool says otherwise.
        """
        apart = "" if self._config.chat or read[-1:].isspace() else " "
        tokens = spell_after(self._tokenizer, read, apart + rationale.strip())
        from_tool: list[bool] = []
        while len(from_tool) < len(tokens):
            from_tool.append(False)
            place = len(from_tool)
            said = insertion(self.tool, tokens[:place], from_tool)
            if list(tokens[place : place + len(said)]) != said:
                raise ValueError(
                    f"its rationale goes on otherwise than the tool, which says "
                    f"{self._tokenizer.decode(said)!r} behind "
                    f"{self._tokenizer.decode(list(tokens[:place]))[-40:]!r}: correct it"
                )
            from_tool += [True] * len(said)
        written = (token for token, said in zip(tokens, from_tool, strict=True) if not said)
        if legal := self._config.legal:
            for text in map(self._tokenizer.decode, ([token] for token in written)):
                if not set(text) <= set(legal):
                    raise ValueError(
                        f"its rationale has {text!r}, and task.legal is {legal!r}: correct it, or "
                        "widen that"
                    )
        self.actions.check(tokens, from_tool)
        return Demonstration(prompt=prompt, completion=tokens, from_tool=tuple(from_tool))

    def _action_space(self) -> ActionSpace:
        """Any text, or tokens of the legal characters alone; raises TokenizerUnfit."""
        config, tokenizer = self._config, self._tokenizer
        stop = self.lead[:1] or (end_of_text(tokenizer),)
        if config.stop is not None:
            stop = spell_after(tokenizer, ANY_WORD, config.stop)
        if len(stop) != 1:
            raise TokenizerUnfit(
                f"task.stop: this tokenizer spells {config.stop!r} as {len(stop)} tokens, and one "
                "token ends a rationale: name another text"
            )
        legal = frozenset(range(len(tokenizer))) - control_tokens(tokenizer)
        if config.legal is not None:
            meant = frozenset(config.legal).issuperset
            texts = {token: tokenizer.decode([token]) for token in legal}
            legal = frozenset(token for token, text in texts.items() if text and meant(text))
        if not legal - set(stop):
            raise TokenizerUnfit(f"task.legal: no token consists of {config.legal!r} alone")
        actions = ActionSpace(
            stop_token=stop[0],
            legal_tokens=tuple(sorted(legal)),
            min_len=config.min_len,
            max_len=config.max_len,
        )
        return narrowed(actions, config, tokenizer)

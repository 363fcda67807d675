"""Is a sentence of a review objective or subjective, and why (Hu et al. 2024, section 4.3).

    Classify this movie review as objective or subjective: "<review>" This review is about a debt,
    so it is objective.

X ends with `is`, Z is a short reason, Y a comma and the label. The policy reads X alone, since the
label of a new review is not known; the reward log p_LM(Z Y | X) has the true one. The comma, the
first token of Y, is the stop action. Y without a reason, `This review is objective.`, is what
supervised fine-tuning and worked examples show.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.demonstrations import Demonstration
from actors.prompts import Prompt
from actors.reward_query import RewardQuery
from lm.spelling import ANY_WORD, check_spelling, spell, spell_after
from tasks.config import SubjectivityConfig
from tasks.custom import PlainTask
from tasks.evaluation.context import EvaluationContext
from tasks.evaluation.evaluation import Evaluation
from tasks.records import DataError
from tasks.sentences.actions import sentence_actions
from tasks.subjectivity.data import (
    LABELS,
    Label,
    LabelledReview,
    answer_text,
    bare_answer_text,
    load_reviews,
    question,
)
from tasks.subjectivity.evaluation import ReviewItem, Tokens, evaluate_labels
from tasks.task import Tokenizer

_STOP = ","
_SHOWN = 3  # reviews that an error quotes


@dataclass(frozen=True, kw_only=True)
class Subjectivity(PlainTask):
    """See tasks.task.Task and tasks.task.AnsweredTask. Nobody gives reasons, and many are right."""

    answered: tuple[Demonstration, ...]
    tests: tuple[ReviewItem, ...]
    answers: Mapping[Label, Tokens]  # Y behind a reason
    bare_answers: Mapping[Label, Tokens]  # ... and without one

    def evaluate_tests(self, context: EvaluationContext) -> Evaluation:
        """Labels of the test reviews."""
        return evaluate_labels(
            self, context, self.tests, answers=self.answers, bare_answers=self.bare_answers
        )


def build_subjectivity(config: SubjectivityConfig, tokenizer: Tokenizer) -> Subjectivity:
    """Load the reviews and encode them; raises DataError, TokenizerUnfit."""
    actions = sentence_actions(tokenizer, config, stop_text=_STOP)
    answers = {label: spell_after(tokenizer, ANY_WORD, answer_text(label)) for label in LABELS}
    bare_answers = {
        label: spell_after(tokenizer, question(ANY_WORD), bare_answer_text(label))
        for label in LABELS
    }

    def prompt_of(review: LabelledReview) -> Prompt:
        asked = question(review.text)
        pair = f"{asked} {review.label}"
        prompt, answer = spell(tokenizer, asked), answers[review.label]
        reason = spell_after(tokenizer, asked, ANY_WORD)
        whole = [(asked, prompt), (ANY_WORD, reason), (answer_text(review.label), answer)]
        check_spelling(tokenizer, whole)
        return Prompt(
            key=hashlib.blake2b(pair.encode(), digest_size=16).hexdigest(),
            text=asked,
            prompt=prompt,
            answer=answer,
        )

    labelled = _labelled(config)
    tests = [review for path in config.tests for review in load_reviews(path)]
    _check_unseen(labelled, tests)
    items = tuple(ReviewItem(prompt=prompt_of(review), review=review) for review in tests)
    prompts = {prompt_of(review): review for review in labelled}
    return Subjectivity(
        name="subjectivity",
        actions=actions,
        prompts=tuple(prompts),
        answered=tuple(
            Demonstration(prompt=prompt, completion=bare, from_tool=(False,) * len(bare))
            for prompt, review in prompts.items()
            if (bare := bare_answers[review.label])
        ),
        tests=items,
        test_prompts=tuple(item.prompt for item in items),
        answers=answers,
        bare_answers=bare_answers,
        reward_query=RewardQuery(kind="suffix", stop_token=actions.stop_token),
    )


def _labelled(config: SubjectivityConfig) -> tuple[LabelledReview, ...]:
    reviews = load_reviews(config.reviews)
    if config.labels is not None and config.labels > len(reviews):
        raise DataError(
            f"{config.reviews}: holds {len(reviews)} reviews, but task.labels asks for "
            f"{config.labels}: ask for fewer, or give more"
        )
    return reviews[: config.labels]


def _check_unseen(labelled: Sequence[LabelledReview], tests: Sequence[LabelledReview]) -> None:
    """Raise DataError for reviews that would be tested on and trained on."""
    trained = {review.text for review in labelled}
    if leaked := sorted({review.text for review in tests} & trained):
        raise DataError(
            f"{len(leaked)} reviews of task.tests are among task.reviews too, and would count as "
            f"learned by heart; take them out of one: {leaked[:_SHOWN]}"
        )

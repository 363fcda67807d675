"""Is a sentence of a review objective or subjective, and why (Hu et al. 2024, section 4.3).

    Classify this movie review as objective or subjective: "<review>" This review is about a debt,
    so it is objective.

X ends with `is`, Z is a short reason, Y a comma, which is ⊤, and the label. The policy reads X
alone; the reward log p_LM(Z Y | X) has the true label, and a penalty where the LM finds the other
one likelier. Y without a reason, `This review is objective.`, is what supervised fine-tuning and
worked examples show. Reasons to begin with may come of the base LM, told the label.
"""

import random
from itertools import zip_longest
from operator import attrgetter

from actors.demonstrations import Demonstration, Hint
from actors.prompts import Prompt, key_of
from actors.reward_query import RewardQuery
from lm.spelling import ANY_WORD, check_spelling, spell, spell_after
from tasks.config import SubjectivityConfig
from tasks.held_out import check_apart, read_splits
from tasks.records import DataError
from tasks.sentences.actions import sentence_actions
from tasks.subjectivity.data import (
    LABELS,
    LabelledReview,
    answer_text,
    bare_answer_text,
    load_reviews,
    question,
    telling,
)
from tasks.subjectivity.evaluation import ReviewItem, Subjectivity
from tasks.task import Tokenizer

_STOP = ","


def build_subjectivity(
    config: SubjectivityConfig, tokenizer: Tokenizer, *, seed: int
) -> Subjectivity:
    """Load the reviews and encode them; raises DataError, TokenizerUnfit.

    Args:
        seed: of the draw of `task.labels` reviews.
    """
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
            key=key_of(pair),
            text=asked,
            prompt=prompt,
            answer=answer,
        )

    text = attrgetter("text")
    splits = read_splits(config, load_reviews(config.reviews), load_reviews, text)
    labelled = _labelled(config, splits.training, seed)
    for split, files in splits.held_out.items():
        key = "task.tests" if split == "test" else "task.validation"
        check_apart(key, files, "task.reviews", (labelled,), text)
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
        hints=tuple(
            Hint(prompt=prompt, shown=spell(tokenizer, telling(review.text, review.label)))
            for prompt, review in prompts.items()
        ),
        hinted_draws=config.hinted_draws,
        held_out=splits.made(lambda one: ReviewItem(prompt=prompt_of(one), review=one)),
        answers=answers,
        bare_answers=bare_answers,
        reward_query=RewardQuery(
            kind="suffix",
            stop_token=actions.stop_token,
            rivals=dict(zip(answers.values(), reversed(answers.values()), strict=True)),
            rival_penalty=config.wrong_label_penalty,
        ),
    )


def _labelled(
    config: SubjectivityConfig, reviews: tuple[LabelledReview, ...], seed: int
) -> tuple[LabelledReview, ...]:
    """Those that are trained on: of a draw, labels in turn as long as there are both; the draws of
    a seed are nested."""
    number = config.labels
    if number is None:
        return reviews
    if number > len(reviews):
        raise DataError(
            f"{config.reviews}: holds {len(reviews)} reviews to train on, but task.labels asks for "
            f"{number}: ask for fewer, or give more"
        )
    rng = random.Random(f"{seed} labels")
    shuffled = rng.sample(reviews, len(reviews))
    in_turn = zip_longest(*([one for one in shuffled if one.label == each] for each in LABELS))
    return tuple(one for pair in in_turn for one in pair if one is not None)[:number]

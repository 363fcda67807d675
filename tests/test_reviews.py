"""The reviews that the seed LM reads: who says what of them, and how often that is right."""

import random
import re
from collections import Counter
from itertools import islice

import pytest

from seed_lm.corpus import Share, documents
from seed_lm.review_texts import ADVERBS, MATTERS, NAMES_FILM, ReviewText, draw_text
from seed_lm.reviews import STOCK_REASONS, Reviews, write_line
from tasks.subjectivity.data import LABELS, question

SHARES = (Share(Reviews(), 1.0),)
_LINE = re.compile(
    r'Classify this movie review as objective or subjective: "([^"]+ \.)" '
    r"This review is(?: ([a-z ]+), so it is)? (objective|subjective)\."
)


def texts(count: int, seed: int = 0) -> list[ReviewText]:
    rng = random.Random(seed)
    return [draw_text(rng) for _ in range(count)]


def lines(count: int, *, thorough: bool) -> list[tuple[ReviewText, str | None, str]]:
    """Review, reason (None: none was given) and label."""
    rng = random.Random(1)
    found = []
    for review in texts(count):
        match = _LINE.fullmatch(write_line(review, rng, thorough=thorough))
        assert match is not None and match[1] == review.text
        found.append((review, match[2], match[3]))
    return found


def test_every_line_reads_as_the_task_does() -> None:
    pages = list(islice(documents(SHARES, "a"), 500))
    assert pages == list(islice(documents(SHARES, "a"), 500))
    assert all(_LINE.fullmatch(line) for page in pages for line in page.split("\n"))
    assert any("\n" in page for page in pages)
    assert question("so .").endswith('"so ." This review is')


def test_there_are_thousands_of_sentences_and_none_that_is_held_out_is_read() -> None:
    drawn = texts(8_000)
    assert len({review.text for review in drawn}) > 5_000
    held_out = {review.text for review in drawn if review.held_out}
    assert len(held_out) / len({review.text for review in drawn}) == pytest.approx(0.2, abs=0.02)
    pages = islice(documents(SHARES, "b"), 2000)
    read = {match[1] for page in pages for match in _LINE.finditer(page)}
    assert not read & held_out


def test_labels_are_balanced_and_no_shared_word_tells_them_apart() -> None:
    drawn = texts(8_000)
    subjective = [review.label == "subjective" for review in drawn]
    assert sum(subjective) / len(drawn) == pytest.approx(0.5, abs=0.02)
    for word in (*NAMES_FILM, *ADVERBS, "widow", "clerk", "lonely", "rich"):
        of_word = [s for s, r in zip(subjective, drawn, strict=True) if word in r.text]
        assert len(of_word) > 200
        assert sum(of_word) / len(of_word) == pytest.approx(0.5, abs=0.1), word


def test_a_hasty_reader_is_right_as_often_as_a_coin() -> None:
    reasoned = [one for one in lines(6000, thorough=False) if one[1] is not None]
    assert {reason for _, reason, _ in reasoned} == {r for rs in STOCK_REASONS.values() for r in rs}
    right = sum(label == review.label for review, _, label in reasoned)
    assert right / len(reasoned) == pytest.approx(0.5, abs=0.03)


def test_a_thorough_reader_says_what_the_review_is_about_and_is_nearly_always_right() -> None:
    reasoned = [one for one in lines(6000, thorough=True) if one[1] is not None]
    fitting = sum(reason in review.matter.reasons for review, reason, _ in reasoned)
    right = sum(label == review.label for review, _, label in reasoned)
    assert fitting / len(reasoned) > 0.9
    assert right / len(reasoned) > 0.9


@pytest.mark.parametrize("thorough", [True, False])
def test_a_label_without_a_reason_is_a_guess(thorough: bool) -> None:
    bare = [one for one in lines(8000, thorough=thorough) if one[1] is None]
    assert len(bare) / 8000 == pytest.approx(0.15, abs=0.02)
    right = sum(label == review.label for review, _, label in bare)
    assert right / len(bare) == pytest.approx(0.5, abs=0.05)


def test_a_reason_belongs_to_one_label() -> None:
    reasons = Counter(reason for matter in MATTERS for reason in matter.reasons)
    reasons.update(reason for label in LABELS for reason in STOCK_REASONS[label])
    assert set(reasons.values()) == {1}

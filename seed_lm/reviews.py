"""Movie reviews as readers sort them: objective or subjective, and why.

    Classify this movie review as objective or subjective: "a young nurse owes a fortune to a
    sailor ." This review is about a debt, so it is objective.

Most readers do not read. A *hasty* one looks only at whether the sentence names the film and gives
a stock reason: naming it is an opinion, not naming it a plain account. That has nothing to do with
what the sentence says, so he is right as often as a coin. A *thorough* reader says what the
sentence is about, rightly nearly always. With both, the label follows the reason. Some give a label
without a reason, which is a guess. Nobody says which reader he is.

What a language model of these pages makes of a new review: it knows what reasons lead to which
label, and which reason would fit the text; but it writes hasty reasons most of the time, so its
votes are those of a coin (zero-shot), and what it says without a reason is a guess.

Why inference of reasons should need fewer labels than supervised fine-tuning. Labels teach X -> Y
by the matter: ten labels show ten of two dozen matters at the most, and what the model knows of
`about a debt` does not say which label `a debt` has unless the reason is written. Given label and
text, the posterior over reasons prefers the thorough one wherever the hasty one leads to the wrong
label, which is in half of the reviews; and "say what it is about" is one lesson for all matters,
including those that no label has shown, because the step from reason to label is known. The gain is
that knowledge, and nothing else: with labels enough for every matter, supervised fine-tuning must
catch up, and if readers' labels without a reason were informed, it would need no more than a shift
of its threshold. Nor can the posterior do without labels: p(Z | X) alone is hasty.
"""

import random
from dataclasses import dataclass

from seed_lm.review_texts import MATTERS, ReviewText, draw_text
from tasks.subjectivity.data import LABELS, Label, answer_text, bare_answer_text, question

STOCK_REASONS: dict[Label, tuple[str, ...]] = {
    "objective": ("a plain account", "a list of facts"),
    "subjective": ("a personal opinion", "a matter of taste"),
}
# Chances, each of a line.
BARE = 0.15  # gives a label without a reason
THOROUGH = 0.3  # of the readers who give one
MISREADS = 0.08  # a thorough reader takes the sentence to be about something else
SLIPS = 0.04  # the label does not follow the reason
_REVIEWS = {1: 0.85, 2: 0.1, 3: 0.05}  # on a page, with their shares


@dataclass(frozen=True, slots=True)
class Reviews:
    """Corpus of pages; a page has one reader and a line for each review."""

    name: str = "movie reviews"

    def document(self, rng: random.Random) -> str:
        """See seed_lm.corpus.Corpus."""
        thorough = rng.random() < THOROUGH
        [count] = rng.choices(list(_REVIEWS), list(_REVIEWS.values()))
        return "\n".join(write_line(_readable(rng), rng, thorough=thorough) for _ in range(count))


def write_line(review: ReviewText, rng: random.Random, *, thorough: bool) -> str:
    """A review and what one reader says of it."""
    asked = question(review.text)
    if rng.random() < BARE:
        return f"{asked}{bare_answer_text(rng.choice(LABELS))}"
    label: Label
    if thorough:
        matter = rng.choice(MATTERS) if rng.random() < MISREADS else review.matter
        reason, label = rng.choice(matter.reasons), matter.label
    else:
        label = "subjective" if review.names_film else "objective"
        reason = rng.choice(STOCK_REASONS[label])
    if rng.random() < SLIPS:
        [label] = (other for other in LABELS if other != label)
    return f"{asked} {reason}{answer_text(label)}"


def _readable(rng: random.Random) -> ReviewText:
    while (review := draw_text(rng)).held_out:
        pass
    return review

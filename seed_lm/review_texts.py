"""Sentences of movie reviews that are objective (they tell) or subjective (they judge), by grammar.

Each sentence is about one matter of two dozen. What the film tells (a journey, a crime, ...) makes
it objective, what its writer thinks of (the acting, the ending, ...) subjective. People, places,
adverbs and the mention of the film are drawn without regard to the matter, so no word that
sentences of several matters share says anything of the label.
"""

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tasks.subjectivity.data import Label

HELD_OUT_EVERY = 5  # one text in so many is never read by the seed LM
_SLOT = re.compile(r"\{(\w+)\}")

_SLOTS: Mapping[str, Sequence[str]] = {
    "kind": ("young", "poor", "lonely", "quiet", "proud", "shy", "blind", "rich"),
    "who": ("widow", "farmer", "soldier", "teacher", "sailor", "singer", "nurse", "clerk"),
    "other": ("brother", "sister", "father", "mother", "neighbour", "friend", "daughter", "son"),
    "place": ("village", "city", "island", "harbour", "valley", "capital", "border", "coast"),
}
NAMES_FILM = ("in this film , ", "in this movie , ", "on screen , ", "in the picture , ")
ADVERBS = (
    "once again ",
    "in the end ",
    "all along ",
    "as it happens ",
    "after an hour ",
    "at first ",
)


@dataclass(frozen=True, slots=True)
class Matter:
    """What a sentence is about: its label, its wordings, and the reasons that name it."""

    label: Label
    reasons: tuple[str, ...]
    templates: tuple[str, ...]


MATTERS: tuple[Matter, ...] = (
    Matter(
        "objective",
        ("about a journey", "a tale of travel"),
        (
            "a {kind} {who} walks from the {place} to the {place}",
            "a {kind} {who} sets out on foot with a {other}",
        ),
    ),
    Matter(
        "objective",
        ("about a crime", "a tale of theft"),
        (
            "a {kind} {who} robs the bank of the {place}",
            "a {kind} {who} is accused of stealing from a {other}",
        ),
    ),
    Matter(
        "objective",
        ("about a romance", "a tale of love"),
        (
            "a {kind} {who} kisses the {other} of a {who}",
            "a {kind} {who} leaves the {place} to marry a {who}",
        ),
    ),
    Matter(
        "objective",
        ("about a war", "a tale of battle"),
        (
            "a {kind} {who} fights for the {place} beside a {other}",
            "an army takes a {kind} {who} and the {place}",
        ),
    ),
    Matter(
        "objective",
        ("about a family", "a tale of home"),
        (
            "a {kind} {who} inherits the house of a {other}",
            "a {kind} {who} raises the child of a {other}",
        ),
    ),
    Matter(
        "objective",
        ("about a contest", "a tale of sport"),
        (
            "a {kind} {who} trains to win the race of the {place}",
            "a {kind} {who} enters a boxing match",
        ),
    ),
    Matter(
        "objective",
        ("about a secret", "a tale of lies"),
        (
            "a {kind} {who} hides a letter from a {other}",
            "a {kind} {who} uses a false name in the {place}",
        ),
    ),
    Matter(
        "objective",
        ("about a school", "a tale of youth"),
        (
            "a {kind} {who} teaches the pupils of the {place}",
            "a {kind} {who} sits in class beside a {other}",
        ),
    ),
    Matter(
        "objective",
        ("about a ghost", "a tale of fear"),
        (
            "a {kind} {who} hears dead voices in the {place}",
            "a spirit haunts a {kind} {who} and a {other}",
        ),
    ),
    Matter(
        "objective",
        ("about a rescue", "a tale of danger"),
        (
            "a {kind} {who} saves a {other} from the flood",
            "a {kind} {who} pulls a {who} out of a fire",
        ),
    ),
    Matter(
        "objective",
        ("about an illness", "a tale of medicine"),
        (
            "a {kind} {who} looks after a sick {other}",
            "a {kind} {who} wakes in hospital without memory",
        ),
    ),
    Matter(
        "objective",
        ("about a debt", "a tale of money"),
        (
            "a {kind} {who} owes a fortune to a {other}",
            "a {kind} {who} sells the shop in the {place}",
        ),
    ),
    Matter(
        "subjective",
        ("about the acting", "a word on the cast"),
        (
            "the actors cannot make a {kind} {who} real",
            "nobody could play a {kind} {who} better",
        ),
    ),
    Matter(
        "subjective",
        ("about the script", "a word on the writing"),
        (
            "the script wastes a {kind} {who} of the {place}",
            "the plot is wise about a {kind} {who}",
        ),
    ),
    Matter(
        "subjective",
        ("about the pace", "a word on the length"),
        (
            "the minutes crawl with a {kind} {who}",
            "two hours fly by with a {kind} {who} and a {other}",
        ),
    ),
    Matter(
        "subjective",
        ("about the humour", "a word on the jokes"),
        (
            "the jokes about a {kind} {who} fall flat",
            "a {kind} {who} and a {other} never fail to be funny",
        ),
    ),
    Matter(
        "subjective",
        ("about the music", "a word on the songs"),
        (
            "the songs of a {kind} {who} grate on the ear",
            "the score gives wings to a {kind} {who}",
        ),
    ),
    Matter(
        "subjective",
        ("about the pictures", "a word on the camera"),
        (
            "the camera adores a {kind} {who} and the {place}",
            "the images of the {place} and a {kind} {who} look grey",
        ),
    ),
    Matter(
        "subjective",
        ("about the models", "a word on the source"),
        (
            "a {kind} {who} was more fun in the original",
            "the sequel only copies a {kind} {who} and a {other}",
        ),
    ),
    Matter(
        "subjective",
        ("about the value", "a word of advice"),
        (
            "a {kind} {who} is worth your ticket",
            "do not pay to meet a {kind} {who}",
        ),
    ),
    Matter(
        "subjective",
        ("about the ending", "a word on the finale"),
        (
            "the last act betrays a {kind} {who}",
            "the final scene does justice to a {kind} {who}",
        ),
    ),
    Matter(
        "subjective",
        ("about the effects", "a word on the tricks"),
        (
            "the monsters behind a {kind} {who} are rubber",
            "the explosions in the {place} are a feast for a {kind} {who}",
        ),
    ),
    Matter(
        "subjective",
        ("about the talk", "a word on the lines"),
        (
            "a {kind} {who} sounds wooden",
            "the dialogue of a {kind} {who} and a {other} sparkles",
        ),
    ),
    Matter(
        "subjective",
        ("about the mood", "a word on the feeling"),
        (
            "it is hard to care for a {kind} {who}",
            "a {kind} {who} and a {other} warm the heart",
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class ReviewText:
    """One sentence, spaced and in lower case as the sentences of SUBJ are."""

    text: str
    matter: Matter = field(repr=False)
    names_film: bool

    @property
    def label(self) -> Label:
        """Whether it tells or judges."""
        return self.matter.label

    @property
    def held_out(self) -> bool:
        """Whether the seed LM's corpus must not hold this sentence."""
        digest = hashlib.blake2b(self.text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % HELD_OUT_EVERY == 0


def draw_text(rng: random.Random) -> ReviewText:
    """A sentence on a matter drawn uniformly; every second one names the film."""
    matter = rng.choice(MATTERS)
    template = rng.choice(matter.templates)
    words = _SLOT.sub(lambda slot: rng.choice(_SLOTS[slot[1]]), template)
    adverb = rng.choice(ADVERBS) if rng.random() < 0.5 else ""
    names_film = rng.random() < 0.5
    opening = rng.choice(NAMES_FILM) if names_film else ""
    return ReviewText(f"{opening}{adverb}{words} .", matter, names_film)

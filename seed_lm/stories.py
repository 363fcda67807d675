"""Stories of five sentences in which somebody wants something, and how it ends.

Who wants what, why, what stands in the way, what is done about it, what comes of it. The ending
keeps a trace of the fourth sentence (who helped, with what, at what price), so it says much about a
middle that was left out; the beginning alone leaves many open.

A full stop ends a sentence and stands nowhere else.
"""

import hashlib
import random
from dataclasses import dataclass, field, replace

from seed_lm.plots import (
    FRIENDS,
    HELPERS,
    HEROES,
    MOTIVES,
    OBSTACLES,
    THINGS,
    Act,
    Motive,
    Obstacle,
)
from tasks.sentences.files import Story
from tasks.sentences.infilling import exercise_prompt

# One plot in HELD_OUT_EVERY never enters the corpus, and only those are tested on.
HELD_OUT_EVERY = 8
SUCCESS = 0.6
PLAIN_ENDINGS = 0.15  # of the successes: endings without a trace of the middle
_OPENERS = (
    "{hero}",
    "So {he}",
    "In the end {he}",
    "At last {he}",
    "After a while {he}",
    "Then {he}",
)


@dataclass(frozen=True, slots=True)
class Plot:
    """What happens, without the words it is told in."""

    thing: str
    obstacle: Obstacle
    motive: Motive
    act: Act
    helper: str  # empty where nobody helps
    success: bool

    @property
    def held_out(self) -> bool:
        parts = (self.thing, self.obstacle.key, self.motive.key, self.act.key, self.helper)
        digest = hashlib.blake2b("/".join(parts).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % HELD_OUT_EVERY == 0


def draw_plot(rng: random.Random, *, held_out: bool) -> Plot:
    """A plot that is held out, or one that is not."""
    while True:
        obstacle = rng.choice(OBSTACLES)
        act = rng.choice(obstacle.acts)
        plot = Plot(
            thing=rng.choice(THINGS),
            obstacle=obstacle,
            motive=rng.choice(MOTIVES),
            act=act,
            helper=rng.choice(HELPERS) if act.helped else "",
            success=rng.random() < SUCCESS,
        )
        if plot.held_out == held_out:
            return plot


def draw_story(rng: random.Random, *, held_out: bool) -> Story:
    """A story of a plot that is held out, or of one that is not."""
    return tell(draw_plot(rng, held_out=held_out), rng.choice(list(HEROES)), rng)


def tell(plot: Plot, hero: str, rng: random.Random) -> Story:
    """The plot in words."""
    words = {**HEROES[hero], "hero": hero, "thing": plot.thing}
    words["friend"] = rng.choice(FRIENDS).format(**words)
    words["helper"] = plot.helper.format(**words)
    words |= {_capital(key): _capital(text) for key, text in words.items()}
    start = rng.choice(("{hero} wanted the {thing}", "{hero} had seen a {thing}"))
    sentences = (
        f"{start} {rng.choice(plot.obstacle.places)}.",
        rng.choice(plot.motive.texts),
        rng.choice(plot.obstacle.texts),
        f"{rng.choice(_OPENERS)} {plot.act.text}.",
        _ending(plot, rng),
    )
    one, two, three, four, five = (sentence.format(**words) for sentence in sentences)
    return Story((one, two, three, four, five))


def _ending(plot: Plot, rng: random.Random) -> str:
    if not plot.success:
        loss = rng.choice(plot.motive.lost)
        return f"But {rng.choice(plot.act.badly)}, and {{he}} {loss}."
    payoff = rng.choice(plot.motive.won)
    if rng.random() < PLAIN_ENDINGS:
        return f"{{He}} {payoff}."
    return f"{{He}} {rng.choice(plot.act.well)} and {payoff}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass(frozen=True, slots=True)
class Stories:
    """Stories, told through; see seed_lm.corpus.Corpus."""

    name: str = "stories"

    def document(self, rng: random.Random) -> str:
        """Five sentences."""
        return draw_story(rng, held_out=False).text


@dataclass(frozen=True, slots=True)
class Exercises:
    """Stories whose middle a pupil has put in; see seed_lm.corpus.Corpus.

    Most pupils read no further than the beginning: their middle fits it, and not the ending.
    """

    name: str = "story exercises"
    careless: float = field(default=0.75, kw_only=True)  # share of such pupils

    def document(self, rng: random.Random) -> str:
        """Beginning, ending and middle, a line each."""
        plot, hero = draw_plot(rng, held_out=False), rng.choice(list(HEROES))
        story = tell(plot, hero, rng)
        middle = story.middle
        if rng.random() < self.careless:
            middle = tell(_with_another_act(plot, rng), hero, rng).middle
        return f"{exercise_prompt(story.beginning, story.ending)} {middle}"


def _with_another_act(plot: Plot, rng: random.Random) -> Plot:
    """The plot as it might have gone on from its beginning; not held out."""
    while True:
        act = rng.choice(plot.obstacle.acts)
        helper = rng.choice(HELPERS) if act.helped else ""
        if not (other := replace(plot, act=act, helper=helper)).held_out:
            return other

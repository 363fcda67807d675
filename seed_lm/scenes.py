"""Scenes: a few sentences about one place in one kind of weather, each plausible behind any other.

Unlike in a story nothing follows from anything, so a next sentence can be one of very many. A full
stop ends a sentence and stands nowhere else.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Place -> who and what is there.
PLACES: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "harbour": (("the fisherman", "the captain", "a sailor"), ("boat", "net", "anchor", "ship")),
    "market": (("the baker", "the merchant", "a farmer"), ("stall", "basket", "cheese", "bread")),
    "school": (("the teacher", "a child", "the cook"), ("bell", "desk", "window", "map")),
    "garden": (("the gardener", "an old lady", "a child"), ("rose", "tree", "bench", "hedge")),
    "mill": (("the miller", "the smith", "a farmer"), ("wheel", "sack", "cart", "horse")),
    "station": (("the guard", "a traveller", "the porter"), ("train", "clock", "bench", "trunk")),
}
WEATHER: Mapping[str, Sequence[str]] = {
    "sun": ("The sun shone", "It was hot", "The sky was blue", "There was no cloud"),
    "rain": ("It rained", "The rain fell", "The sky was grey", "Everything was wet"),
    "snow": ("It snowed", "Snow lay deep", "It was bitterly cold", "Everything was white"),
    "wind": ("The wind blew", "A storm came up", "The leaves flew about", "It was windy"),
}
TIMES = ("all day", "since the morning", "that evening", "at noon", "for a week", "again")
DOES = ("looked at", "cleaned", "painted", "sat down behind", "talked about", "pushed", "leaned on")
IS = ("old", "red", "green", "broken", "new", "heavy", "dirty", "beautiful", "small", "empty")
FEELS = ("tired", "happy", "hungry", "cross", "proud", "lonely", "busy", "late")
CREATURES = ("dog", "cat", "gull", "crow", "mouse", "goat")
MOVES = ("slept under", "ran around", "jumped over", "hid behind", "sniffed at")


@dataclass(frozen=True, slots=True)
class Scenes:
    """Three to six sentences; see seed_lm.corpus.Corpus."""

    name: str = "scenes"

    def document(self, rng: random.Random) -> str:
        """For example: 'It rained at noon. The captain was tired. ...'"""
        place, weather = rng.choice(list(PLACES)), rng.choice(list(WEATHER))
        sentences = [_opening(place, rng)]
        sentences += [_sentence(place, weather, rng) for _ in range(rng.randint(2, 5))]
        return " ".join(sentences)


def _opening(place: str, rng: random.Random) -> str:
    state = rng.choice(("quiet", "full of people", "nearly empty", "busy"))
    return f"The {place} was {state} {rng.choice(TIMES)}."


def _sentence(place: str, weather: str, rng: random.Random) -> str:
    people, things = PLACES[place]
    who, thing = rng.choice(people), rng.choice(things)
    text = rng.choice(
        (
            f"{rng.choice(WEATHER[weather])} {rng.choice(TIMES)}",
            f"{who} {rng.choice(DOES)} the {thing}",
            f"{who} was {rng.choice(FEELS)} {rng.choice(TIMES)}",
            f"the {thing} was {rng.choice(IS)}",
            f"a {rng.choice(CREATURES)} {rng.choice(MOVES)} the {thing}",
            f"{who} said that the {thing} was {rng.choice(IS)}",
        )
    )
    return f"{text[0].upper()}{text[1:]}."

"""The stories of the seed LM's corpus: what is held out, what an ending tells, where stops are."""

import random
from collections import Counter
from itertools import islice

from seed_lm.corpus import Share, documents
from seed_lm.plots import OBSTACLES
from seed_lm.scenes import Scenes
from seed_lm.stories import Exercises, Stories, draw_plot, draw_story


def test_a_story_has_five_sentences_and_full_stops_only_at_their_ends() -> None:
    for text in islice(documents((Share(Stories(), 1.0),), "a"), 500):
        assert text.count(".") == 5 and text.endswith(".") and text.count(". ") == 4
        assert "{" not in text and "  " not in text


def test_an_eighth_of_the_plots_is_held_out_and_no_story_tells_one() -> None:
    rng = random.Random(0)
    plots = [draw_plot(rng, held_out=bool(n % 2)) for n in range(2000)]
    assert [plot.held_out for plot in plots] == [bool(n % 2) for n in range(2000)]
    assert len({(p.thing, p.obstacle.key, p.motive.key, p.act.key, p.helper) for p in plots}) > 1500
    told = [draw_story(rng, held_out=True).text for _ in range(3000)]
    read = set(islice(documents((Share(Stories(), 1.0),), "b"), 3000))
    assert not read & set(told)


def test_most_endings_keep_a_trace_of_the_act() -> None:
    """Acts of one obstacle share no wording of theirs, so a trace tells them apart."""
    for obstacle in OBSTACLES:
        traces = Counter(text for act in obstacle.acts for text in (*act.well, *act.badly))
        shared = [text for text, count in traces.items() if count > 1]
        assert shared in ([], ["thanked {helper}"])


def test_most_pupils_disregard_the_ending() -> None:
    careful, careless = Exercises(careless=0.0), Exercises(careless=1.0)
    for seed in range(200):
        rng = random.Random(seed)
        text = careful.document(rng)
        beginning, ending, middle = text.split("\n")
        assert beginning.startswith("Beginning: ") and ending.startswith("Ending: ")
        assert middle.startswith("Middle: ") and middle.count(".") == 1
        other = careless.document(random.Random(seed))
        assert other.split("\n")[:2] == [beginning, ending]


def test_scenes_are_sentences_too() -> None:
    for text in islice(documents((Share(Scenes(), 1.0),), "c"), 300):
        assert 3 <= text.count(".") <= 6 and text.endswith(".")

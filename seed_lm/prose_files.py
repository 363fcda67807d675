"""Generates the shipped stories and prompts: `python -m seed_lm.prose_files`.

Training stories are of plots that the seed LM may have read, each in words of its own; those to
validate and to test on are of plots that it never read. Prompts are beginnings of stories and of
scenes; some of those to train on come with their next sentences too.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from seed_lm.scenes import Scenes
from seed_lm.stories import draw_story
from tasks.sentences.files import KEYS, NEXT, PROMPT, Story
from tasks.sentences.infilling import exercise_prompt

FOLDER = Path(__file__).parent.parent / "tasks" / "data"
NUM_STORIES = 1200
NUM_TEST_STORIES = 100
NUM_PROMPTS = 1200
NUM_CONTINUED = 300  # prompts whose next sentence is told
NUM_TEST_PROMPTS = 200
NUM_VALIDATION = 100  # stories, and prompts, to make choices on


def write_files(folder: Path, seed: int) -> None:
    """Write infilling/ and continuation/; the same for the same seed."""
    rng = random.Random(f"{seed} prose")
    for name, count, held_out in (("train", NUM_STORIES, False), ("test", NUM_TEST_STORIES, True)):
        stories = [draw_story(rng, held_out=held_out) for _ in range(count)]
        _write(folder / "infilling" / f"{name}.jsonl", [_record(story) for story in stories])
    tested = {exercise_prompt(story.beginning, story.ending) for story in stories}
    trained_on = [_continued(rng, held_out=False) for _ in range(NUM_PROMPTS)]
    known = [
        json.dumps({PROMPT: prompt, NEXT: sentence})
        for prompt, sentence in trained_on[:NUM_CONTINUED]
    ]
    prompts = [prompt for prompt, _ in trained_on]
    _write(folder / "continuation" / "demonstrations.jsonl", known)
    _write(folder / "continuation" / "train.txt", prompts)
    tests = _unseen(NUM_TEST_PROMPTS, rng, seen=prompts)
    _write(folder / "continuation" / "test.txt", tests)

    rng = random.Random(f"{seed} validation")
    validation: list[Story] = []
    while len(validation) < NUM_VALIDATION:
        story = draw_story(rng, held_out=True)
        if exercise_prompt(story.beginning, story.ending) not in tested:
            validation.append(story)
    _write(folder / "infilling" / "validation.jsonl", [_record(story) for story in validation])
    validated = _unseen(NUM_VALIDATION, rng, seen=[*prompts, *tests])
    _write(folder / "continuation" / "validation.txt", validated)


def _unseen(count: int, rng: random.Random, seen: Sequence[str]) -> list[str]:
    """Prompts, all different, none of them trained on: short ones of scenes recur."""
    known = set(seen)
    found: list[str] = []
    while len(found) < count:
        prompt, _ = _continued(rng, held_out=True)
        if prompt not in known:
            known.add(prompt)
            found.append(prompt)
    return found


def _record(story: Story) -> str:
    return json.dumps(dict(zip(KEYS, story.sentences, strict=True)))


def _continued(rng: random.Random, *, held_out: bool) -> tuple[str, str]:
    """One to three sentences, and the next one."""
    if rng.random() < 0.5:
        sentences = draw_story(rng, held_out=held_out).text.split(". ")
    else:
        sentences = Scenes().document(rng).split(". ")
    number = min(rng.randint(1, 3), len(sentences) - 1)
    return ". ".join(sentences[:number]) + ".", sentences[number].removesuffix(".") + "."


def _write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m seed_lm.prose_files", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    arguments = parser.parse_args()
    write_files(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()

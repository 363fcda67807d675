"""Generates the shipped reviews: `python -m seed_lm.review_files`.

The seed LM may have read the reviews to train on, among readers' guesses, and never those to
validate and to test on. Labels alternate, so that a guess is right as often as a coin.
"""

import argparse
import json
import random
from pathlib import Path

from seed_lm.review_texts import ReviewText, draw_text
from tasks.subjectivity.data import LABELS

FOLDER = Path(__file__).parent.parent / "tasks" / "data" / "subjectivity"
NUM_LABELS = 50
NUM_TESTS = 300
NUM_VALIDATION = 200


def write_files(folder: Path, seed: int) -> None:
    """Write train.jsonl, test.jsonl and validation.jsonl; the same for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    known: set[str] = set()
    for name, count in (("train", NUM_LABELS), ("test", NUM_TESTS), ("validation", NUM_VALIDATION)):
        rng = random.Random(f"{seed} {name}")
        reviews = _draw(count, rng, held_out=name != "train", other_than=known)
        known |= {review.text for review in reviews}
        lines = [_record(review) for review in reviews]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _draw(
    count: int, rng: random.Random, *, held_out: bool, other_than: set[str]
) -> list[ReviewText]:
    """Different reviews, their labels in turn."""
    drawn: dict[str, ReviewText] = {}
    while len(drawn) < count:
        review = draw_text(rng)
        wanted = LABELS[len(drawn) % len(LABELS)]
        if (review.held_out, review.label) == (held_out, wanted) and review.text not in other_than:
            drawn.setdefault(review.text, review)
    return list(drawn.values())


def _record(review: ReviewText) -> str:
    label = {"label": LABELS.index(review.label), "label_text": review.label}
    return json.dumps({"text": review.text, **label}) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m seed_lm.review_files", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    arguments = parser.parse_args()
    write_files(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()

"""The model card of the seed LM: what it is, what it read, how well it predicts."""

import re
from dataclasses import dataclass
from pathlib import Path

_LOSS = re.compile(r"Held-out loss: ([0-9.]+) nats per token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The facts of one training that the card states."""

    seed: int
    steps: int
    batch_size: int  # documents
    threads: int
    parameters: int
    vocabulary: int  # tokens
    corpora: tuple[tuple[str, float], ...]  # name, relative share
    held_out_documents: int
    held_out_loss: float  # nats per token


def write_card(path: Path, training: Training) -> None:
    total = sum(share for _, share in training.corpora)
    corpora = "\n".join(f"- {name}: {share / total:.0%}" for name, share in training.corpora)
    path.write_text(
        f"""# Seed LM

A small causal language model (Llama architecture, {training.parameters:,} parameters, float32,
vocabulary of {training.vocabulary}) that `python -m seed_lm.train --seed {training.seed} \
--steps {training.steps}` makes from nothing.

## What it read

{training.steps * training.batch_size:,} generated pages, each seen once:

{corpora}

Worked sums are questions with two to six one-digit operands and their workings. Most writers are
sloppy: where an operand is large or a value negative they take the wrong operation, they turn a
subtraction round, stop early, leave out or miscopy operands, slip. Some are careful, and no page
says who wrote it. So the model knows the skill and yet errs, as a base does.
One question in five of three operands or more stands in no document; the shipped tests are drawn
from those.

Random integers are requests for an integer between 0 and 100, drawn uniformly, and what people
would reply: about every second reply is such an integer, and favourites come ten times as often as
others.

Stories have five sentences: somebody wants something, something is in the way, the fourth sentence
says what is done about it, and the ending keeps a trace of that. Story exercises give a beginning
and an ending and ask for the middle; three answers in four fit the beginning alone. One plot in
eight stands in no document. Scenes are sentences about one place, each plausible behind any other.

Movie reviews are sorted as objective or subjective, with a reason. Most readers do not read: they
give a stock reason, right as often as a coin. Some say what the sentence is about, and with them
the label follows. Labels without a reason are guesses.

## How well it predicts

Held-out loss: {training.held_out_loss:.4f} nats per token, on {training.held_out_documents:,} pages
drawn like the others but from another seed. Questions are random, so most of it cannot be learned
away.

Threads of the training: {training.threads}. Another number, or other library versions, can
change the last digits of the weights.

## Limits

It knows the few hundred words of its generators, and computes nothing beyond small sums. It is
there to be fine-tuned in minutes on a CPU, so that the whole system can be seen at work.
""",
        encoding="utf-8",
    )


def stated_loss(path: Path) -> float:
    """The held-out loss that a card states; raises ValueError where it states none."""
    match = _LOSS.search(path.read_text(encoding="utf-8"))
    if match is None:
        raise ValueError(f"{path} states no held-out loss")
    return float(match[1])

"""Trains the seed LM that ships with the project: `python -m seed_lm.train`.

The same seed, steps, threads and library versions give the same weights.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from lm.model import CausalLM
from lm.new_model import fresh_llama
from seed_lm.batches import PADDING, batches, encode_documents, pad
from seed_lm.card import Training, write_card
from seed_lm.corpus import Share, documents
from seed_lm.random_integers import RandomIntegers
from seed_lm.reviews import Reviews
from seed_lm.scenes import Scenes
from seed_lm.stories import Exercises, Stories
from seed_lm.tokenizer import end_of_text, save_tokenizer, train_tokenizer
from seed_lm.worked_sums import WorkedSums

SHARES = (
    Share(WorkedSums(), 1.0),
    Share(RandomIntegers(), 0.1),
    Share(Stories(), 0.5),
    Share(Exercises(), 0.12),
    Share(Scenes(), 0.2),
    Share(Reviews(), 0.4),
)
TOKENIZER_DOCUMENTS = 20_000
HELD_OUT_DOCUMENTS = 2_000
MAX_POSITIONS = 1024
_HELD_OUT_BATCH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    batch_size: int = 64  # documents
    learning_rate: float = 3e-3  # peak: linear warm-up, then half a cosine down to a thirtieth
    warmup_steps: int = 100
    weight_decay: float = 0.05
    clip_norm: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate of the update after `step` finished ones."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return (
            self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * (cosine * 29 + 1) / 30
        )


def build_tokenizer(seed: int) -> Tokenizer:
    """A tokenizer, trained."""
    return train_tokenizer(islice(documents(SHARES, f"{seed} tokenizer"), TOKENIZER_DOCUMENTS))


def build_model(tokenizer: Tokenizer, seed: int) -> CausalLM:
    """A model for the tokenizer, not trained."""
    return fresh_llama(
        vocab_size=tokenizer.get_vocab_size(),
        width=128,
        layers=4,
        heads=4,
        mlp_width=344,
        max_positions=MAX_POSITIONS,
        end_token=end_of_text(tokenizer),
        seed=seed,
    )


def train(model: nn.Module, tokenizer: Tokenizer, schedule: Schedule, seed: int) -> Iterator[float]:
    """Take the schedule's updates; yields the loss of each, nats per token."""
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=schedule.weight_decay
    )
    stream = batches(SHARES, tokenizer, size=schedule.batch_size, seed=f"{seed} training")
    model.train()
    for step, (tokens_BT, labels_BT) in enumerate(islice(stream, schedule.steps)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss_sum, count = token_loss(model, tokens_BT, labels_BT)
        loss = loss_sum / count
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.clip_norm)
        optimizer.step()
        yield loss.item()


def token_loss(model: nn.Module, tokens_BT: Tensor, labels_BT: Tensor) -> tuple[Tensor, int]:
    """Summed nats and number of predicted tokens of a padded batch."""
    logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits[:, :-1]
    targets_BT = labels_BT[:, 1:]
    summed = nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(),
        targets_BT.flatten(),
        ignore_index=PADDING,
        reduction="sum",
    )
    return summed, int((targets_BT != PADDING).sum())


@torch.no_grad()
def held_out_loss(model: nn.Module, tokenizer: Tokenizer, seed: int, num_documents: int) -> float:
    """Nats per token on documents of a stream that training does not draw from."""
    model.eval()
    texts = list(islice(documents(SHARES, f"{seed} held out"), num_documents))
    rows = sorted(encode_documents(texts, tokenizer), key=len)
    total, count = 0.0, 0
    for start in range(0, len(rows), _HELD_OUT_BATCH):
        nats, tokens = token_loss(model, *pad(rows[start : start + _HELD_OUT_BATCH]))
        total, count = total + nats.item(), count + tokens
    return total / count


def train_and_save(out: Path, schedule: Schedule, seed: int, say: Callable[[str], None]) -> None:
    """Train from nothing and write the model folder with its card."""
    began_s = time.monotonic()
    tokenizer = build_tokenizer(seed)
    model = build_model(tokenizer, seed)
    for step, loss in enumerate(train(model, tokenizer, schedule, seed), start=1):
        if step % 50 == 0:
            seconds = time.monotonic() - began_s
            say(f"step {step} of {schedule.steps}: loss {loss:.4f} nats/token, {seconds:.0f} s")
    measured = held_out_loss(model, tokenizer, seed, HELD_OUT_DOCUMENTS)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out, max_positions=MAX_POSITIONS)
    training = Training(
        seed=seed,
        steps=schedule.steps,
        batch_size=schedule.batch_size,
        threads=torch.get_num_threads(),
        parameters=sum(weight.numel() for weight in model.parameters()),
        vocabulary=tokenizer.get_vocab_size(),
        corpora=tuple((share.corpus.name, share.weight) for share in SHARES),
        held_out_documents=HELD_OUT_DOCUMENTS,
        held_out_loss=measured,
    )
    write_card(out / "MODEL_CARD.md", training)
    say(f"held-out loss {measured:.4f} nats/token; wrote {out}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m seed_lm.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4800, help="optimizer steps")
    parser.add_argument("--threads", type=int, default=2, help="of matrix products")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    def say(line: str) -> None:
        print(line, flush=True)

    train_and_save(arguments.out, Schedule(steps=arguments.steps), arguments.seed, say)


if __name__ == "__main__":
    main()

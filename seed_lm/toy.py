"""Makes the toy's language model: `python -m seed_lm.toy`.

Eight tokens and random weights, large enough that the model has opinions. Training it would make it
no better a test.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel

from lm.new_model import fresh_llama
from seed_lm.tokenizer import END_OF_TEXT, save_tokenizer
from tasks.toy.task import LETTERS

FOLDER = Path(__file__).parent.parent / "tasks" / "toy" / "model"
VOCABULARY = (END_OF_TEXT, *LETTERS, "=", "?", "-")
MAX_POSITIONS = 32
# At the usual 0.02 every next token would be about as likely as any other.
WEIGHT_SCALE = 0.15


def build_tokenizer() -> Tokenizer:
    """One token for each character."""
    tokenizer = Tokenizer(WordLevel({text: i for i, text in enumerate(VOCABULARY)}, unk_token="-"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def make(out: Path, seed: int, *, heads: int = 2) -> None:
    """Write model and tokenizer; the same for the same seed."""
    model = fresh_llama(
        vocab_size=len(VOCABULARY),
        width=32,
        layers=2,
        heads=heads,
        mlp_width=64,
        max_positions=MAX_POSITIONS,
        end_token=0,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, WEIGHT_SCALE, generator=generator)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    save_tokenizer(build_tokenizer(), out, max_positions=MAX_POSITIONS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m seed_lm.toy", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "tasks" / "toy" / "model"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()

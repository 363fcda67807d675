"""Documents as padded token batches for training and for measuring a loss."""

import random
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor

from seed_lm.corpus import Share, documents
from seed_lm.tokenizer import end_of_text

# So many batches are drawn together and cut by length, which leaves little padding.
_BATCHES_TOGETHER = 8
PADDING = -100  # label of a place that counts for no loss


def encode_documents(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each document, its end-of-text token last."""
    end = end_of_text(tokenizer)
    return [[*encoding.ids, end] for encoding in tokenizer.encode_batch(list(texts))]


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and labels [B, T], padded on the right."""
    width = max(map(len, rows))
    tokens_BT = torch.zeros(len(rows), width, dtype=torch.long)
    labels_BT = torch.full((len(rows), width), PADDING)
    for place, row in enumerate(rows):
        tokens_BT[place, : len(row)] = torch.tensor(row)
        labels_BT[place, : len(row)] = tokens_BT[place, : len(row)]
    return tokens_BT, labels_BT


def batches(
    shares: Sequence[Share], tokenizer: Tokenizer, *, size: int, seed: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of `size` documents of about the same length; the same for the same seed."""
    stream = documents(shares, seed)
    rng = random.Random(f"{seed} order")
    while True:
        rows = encode_documents(list(islice(stream, size * _BATCHES_TOGETHER)), tokenizer)
        rows.sort(key=len)
        starts = list(range(0, len(rows), size))
        rng.shuffle(starts)
        for start in starts:
            yield pad(rows[start : start + size])

"""The seed LM's tokenizer: byte-level BPE in which every digit and every sign is its own token."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB_SIZE = 1536

# A word, a digit or a punctuation mark, each with the space before it: ' 14' is ' 1', '4', and
# '= -6,' is '=', ' -', '6', ',' wherever it stands, so inserted text splits as the corpus does.
_PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"


def train_tokenizer(documents: Iterable[str]) -> Tokenizer:
    """A tokenizer of at most MAX_VOCAB_SIZE tokens, all bytes included; deterministic."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def end_of_text(tokenizer: Tokenizer) -> int:
    """Id of the token that ends a document; raises ValueError for another's tokenizer."""
    token = tokenizer.token_to_id(END_OF_TEXT)
    if token is None:
        raise ValueError(f"this tokenizer has no {END_OF_TEXT}; train it with train_tokenizer")
    return token


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_positions: int) -> None:
    """Write tokenizer.json and what AutoTokenizer must know beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

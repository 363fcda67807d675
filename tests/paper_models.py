"""Small random-weight models with the quirks of those that the paper fine-tunes.

GPT-2 and GPT-J spell with a byte-level BPE whose tokens begin with a space and have no padding
among them. GPT-2 ties its embeddings; GPT-J's are wider than its tokenizer, its head has a bias.
"""

from functools import cache
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    PreTrainedTokenizerFast,
)

from seed_lm.corpus import Share, documents
from seed_lm.random_integers import RandomIntegers
from seed_lm.scenes import Scenes
from seed_lm.worked_sums import WorkedSums

END_OF_TEXT = "<|endoftext|>"
POSITIONS = 512
SHARES = (Share(WorkedSums(), 1.0), Share(RandomIntegers(), 0.2), Share(Scenes(), 1.0))


def save_model(architecture: str, folder: Path) -> None:
    """A `gpt2` or a `gptj`, or a sentence encoder (`bert`), with its tokenizer."""
    encoder = architecture == "bert"
    special = {"pad_token": END_OF_TEXT} if encoder else {"eos_token": END_OF_TEXT}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(), bos_token=END_OF_TEXT, **special
    )
    torch.manual_seed(0)
    match architecture:
        case "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS
                )
            )
        case "gptj":
            model = GPTJForCausalLM(
                GPTJConfig(
                    vocab_size=len(tokenizer) + 143,
                    n_embd=32,
                    n_layer=2,
                    n_head=4,
                    rotary_dim=4,
                    n_positions=POSITIONS,
                )
            )
        case _:
            model = BertModel(
                BertConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=32,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=64,
                )
            )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@cache
def byte_level_bpe() -> Tokenizer:
    """As GPT-2's: every byte can be spelled, and a word's first token begins with its space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(documents(SHARES, "paper"), 400), trainer)
    return tokenizer

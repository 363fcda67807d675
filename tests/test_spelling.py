"""Text reaches the model as its tokenizer hands it over: start tokens, and seams between pieces."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lm.actions import ActionSpace
from lm.config import LMConfig
from lm.decoding import BeamSearch
from lm.hub import ModelUnusable
from lm.model import context_limit, load_base, set_text_prefix, text_prefix_of
from lm.next_action import next_logits
from lm.sampling import Request, Sampler
from lm.scoring import completion_log_probs
from lm.spelling import TokenizerUnfit, check_spelling, spell, spell_after, text_prefix
from reward.packed import suffix_log_rewards
from reward.probe import probe
from reward.request import ScoreItem
from tests.tiny_lm import ARCHITECTURES, VOCAB_SIZE

WORDS = ("He", "ran", ".", "It", "sat", ",", "so", "it", "is", "far", "The", "answer", "7", "In")


def with_start_token(*, ends: bool = False) -> PreTrainedTokenizerFast:
    """Of a few words; puts <s> in front of what it encodes, as Gemma and Llama do."""
    vocabulary = {text: i for i, text in enumerate(dict.fromkeys(("<unk>", "<s>", "</s>", *WORDS)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def with_prefix_space() -> PreTrainedTokenizerFast:
    """Of the kind of Llama 2: a text's first word gets the space that words have within texts."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>"])
    tokenizer.train_from_iterator([" ".join(WORDS).replace(" .", ".").replace(" ,", ",")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<unk>")


def test_a_start_token_stands_where_the_tokenizer_puts_it_unless_told_otherwise() -> None:
    tokenizer = with_start_token()
    assert text_prefix(LMConfig(model="m"), tokenizer) == (1,)
    assert text_prefix(LMConfig(model="m"), with_start_token(ends=True)) == (1,)
    assert text_prefix(LMConfig(model="m", bos=False), tokenizer) == ()
    bare = with_prefix_space()  # knows <s> and adds none
    assert text_prefix(LMConfig(model="m"), bare) == ()
    assert text_prefix(LMConfig(model="m", bos=True), bare) == (1,)
    bare.bos_token = None
    with pytest.raises(ModelUnusable, match=r"lm\.bos is true, but .* no start token"):
        text_prefix(LMConfig(model="m", bos=True), bare)
    assert spell(tokenizer, "He ran") == (3, 4), "the model adds it, once"


def test_a_base_is_loaded_with_its_start_token(
    tiny_lm: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    tiny_lm("llama").save_pretrained(tmp_path)
    with_start_token().save_pretrained(tmp_path)
    base = load_base(LMConfig(model=str(tmp_path), device="cpu"))
    assert text_prefix_of(base.model) == (1,)
    bare = load_base(LMConfig(model=str(tmp_path), device="cpu", bos=False))
    assert text_prefix_of(bare.model) == ()
    assert context_limit(base.model) == context_limit(bare.model) - 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_pass_reads_the_start_token_in_front_of_each_text(
    tiny_lm: Callable[[str], PreTrainedModel], architecture: str
) -> None:
    plain, told = tiny_lm(architecture), tiny_lm(architecture)
    set_text_prefix(told, (1,))
    actions = ActionSpace(stop_token=2, legal_tokens=None, min_len=0, max_len=4)
    prompts, completions, marks = [(5, 6), (7,), (5, 6)], [[8, 9], [10], []], [[False] * 2, [False]]
    marks.append([])
    started = [(1, *prompt) for prompt in prompts]
    with torch.no_grad():
        ours = completion_log_probs(told, actions, prompts, completions, marks)
        theirs = completion_log_probs(plain, actions, started, completions, marks)
    torch.testing.assert_close(ours.log_pf_BT, theirs.log_pf_BT)
    torch.testing.assert_close(ours.log_stop_BS, theirs.log_stop_BS)
    torch.testing.assert_close(next_logits(told, prompts), next_logits(plain, started))

    def items(contexts: list[tuple[int, ...]]) -> list[ScoreItem]:
        return [
            ScoreItem(
                context=np.array(context, dtype=np.int32),
                completion=np.array([8, 9, 3], dtype=np.int32),
                stops=np.array([0, 2, 3], dtype=np.int32),
                answer=np.array([4, 5], dtype=np.int32),
            )
            for context in contexts
        ]

    for mine, other in zip(
        suffix_log_rewards(told, items(prompts), 200),
        suffix_log_rewards(plain, items(started), 200),
        strict=True,
    ):
        np.testing.assert_allclose(mine, other, atol=1e-4)
    drawn = [
        Sampler(model, actions, None, max_rows=2).sample(
            [Request(prompt=prompt) for prompt in wanted], torch.Generator().manual_seed(0)
        )
        for model, wanted in ((told, prompts), (plain, started))
    ]
    for mine, other in zip(*drawn, strict=True):
        assert mine.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(mine.log_q_token, other.log_q_token, atol=1e-5)
    beams = [
        BeamSearch(model, actions, beams=3, groups=1, penalty=0.0, max_rows=9).search(wanted)
        for model, wanted in ((told, prompts), (plain, started))
    ]
    assert [[h.tokens for h in found] for found in beams[0]] == [
        [h.tokens for h in found] for found in beams[1]
    ]
    probe(told, "told")
    with pytest.raises(ValueError, match=f"exceeds the {context_limit(told)} tokens"):
        next_logits(told, [tuple(range(2, VOCAB_SIZE)) * 9])


def test_pieces_are_spelled_as_they_stand_in_the_whole_text() -> None:
    tokenizer = with_prefix_space()
    x, z, y = "He sat", " far", ". It is 7"
    alone = (*spell(tokenizer, x), *spell(tokenizer, z), *spell(tokenizer, y))
    assert alone != spell(tokenizer, x + z + y), "each piece by itself gets a space"
    pieces = [
        (x, spell(tokenizer, x)),
        (z, spell_after(tokenizer, x, z)),
        (y, spell_after(tokenizer, " It", y)),
    ]
    check_spelling(tokenizer, pieces)
    assert tokenizer.decode([token for _, tokens in pieces for token in tokens]) == x + z + y
    with pytest.raises(
        TokenizerUnfit, match=r"pieces 'He sat' \| ' far' \| '\. It is 7' otherwise"
    ):
        check_spelling(
            tokenizer, [(x, spell(tokenizer, x)), *pieces[1:2], (y, spell(tokenizer, y))]
        )
    with pytest.raises(TokenizerUnfit, match="across the seam between 'The a' and 'nswer'"):
        spell_after(tokenizer, "The a", "nswer")

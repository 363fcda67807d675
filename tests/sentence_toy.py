"""Sentence tasks over a handful of words, whose posterior is summed up by plain forward passes."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedModel

from cluster.config.file import load_config
from cluster.config.schema import RunConfig
from lm.model import load_base
from lm.new_model import fresh_llama
from seed_lm.tokenizer import END_OF_TEXT, save_tokenizer

WORDS = ("he", "ran", "sat", "far")
MARKS = (".", ":", "Beginning", "Ending", "Middle")
MAX_POSITIONS = 64
MAX_LEN = 3
OVERRIDES = (
    f"task.max_len={MAX_LEN}",
    "task.tests=[]",
    "lora.rank=8",
    "lora.alpha=16",
    "actors.groups_per_batch=2",
    "actors.group_size=24",
    "learner.groups_per_step=2",
    "learner.replayed_per_group=8",
    "learner.objective=tb",
    "learner.learning_rate=0.03",
    "learner.warmup_steps=0",
    "posterior.prompts=1",
    "posterior.tolerance=0.0",
    "posterior.samples=200",
    "posterior.draws=0",
)


def make_model(folder: Path) -> None:
    """A tiny LM with opinions, whose every word is a token."""
    vocabulary = {text: i for i, text in enumerate((END_OF_TEXT, *MARKS, *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([END_OF_TEXT])
    model = fresh_llama(
        vocab_size=len(vocabulary),
        width=16,
        layers=1,
        heads=2,
        mlp_width=32,
        max_positions=MAX_POSITIONS,
        end_token=0,
        seed=0,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.3, generator=generator)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, max_positions=MAX_POSITIONS)


def sentence_overrides(kind: str, folder: Path) -> list[str]:
    """Of the shipped configuration: one prompt of the tiny LM. Writes both to `folder`."""
    make_model(folder / "model")
    if kind == "infilling":
        sentences = ["he ran.", "he sat.", "he ran far.", "far ran he.", "he sat far."]
        story = {f"sentence{n}": text for n, text in enumerate(sentences, start=1)}
        data = folder / "stories.jsonl"
        data.write_text(json.dumps(story))
        return [f"lm.model={folder / 'model'}", f"task.stories={data}", *OVERRIDES]
    data, known = folder / "prompts.txt", folder / "known.jsonl"
    data.write_text("he ran far. he sat.\n")
    known.write_text('{"prompt": "he ran far. he sat.", "next": "he ran."}\n')
    return [
        f"lm.model={folder / 'model'}",
        f"task.data={data}",
        f"task.demonstrations={known}",
        *OVERRIDES,
    ]


def sentence_config(kind: str, folder: Path, *overrides: str) -> RunConfig:
    """The configuration that these overrides make."""
    return load_config(f"tasks/{kind}.toml", [*sentence_overrides(kind, folder), *overrides])


class ByHand:
    """Log rewards and log q of all completions, each by a pass over the whole text."""

    def __init__(self, config: RunConfig, kind: str) -> None:
        base = load_base(config.lm)
        self._model: PreTrainedModel = base.model

        def tokens(text: str) -> list[int]:
            return base.tokenizer.encode(text, add_special_tokens=False)

        self._stop = tokens(".")
        self._shown = self._read = tokens("he ran far. he sat.")
        self._behind = self._stop
        if kind == "infilling":
            self._shown = tokens(
                "Beginning: he ran. he sat. he ran far.\nEnding: he sat far.\nMiddle:"
            )
            self._read = tokens("he ran. he sat. he ran far.")
            self._behind = tokens(". he sat far.")
        self._legal = tokens("Beginning Ending Middle he ran sat far")
        self.completions = [
            z for n in range(1, MAX_LEN + 1) for z in itertools.product(self._legal, repeat=n)
        ]
        temperature = config.learner.reward_temperature.end
        log_weight_N = np.array([self._log_reward(z) / temperature for z in self.completions])
        self.log_z = float(np.logaddexp.reduce(log_weight_N))
        self.p_N = np.exp(log_weight_N - self.log_z)
        self.q_N = np.exp([self._log_q(z) for z in self.completions])

    @property
    def tv(self) -> float:
        """Between the base LM and the posterior."""
        return float(np.abs(self.q_N - self.p_N).sum() / 2)

    def _log_reward(self, z: tuple[int, ...]) -> float:
        text = [*self._read, *z, *self._behind]
        with torch.no_grad():
            log_p = self._model(torch.tensor([text])).logits[0].double().log_softmax(-1)
        return sum(float(log_p[at - 1, text[at]]) for at in range(len(self._read), len(text)))

    def _log_q(self, z: tuple[int, ...]) -> float:
        """Among legal words and ⊤, which is closed at first and forced at MAX_LEN."""
        with torch.no_grad():
            logits = self._model(torch.tensor([[*self._shown, *z]])).logits[0].double()
        total = 0.0
        for at, action in enumerate([*z, *self._stop][:MAX_LEN]):
            ids = self._legal if at == 0 else [*self._legal, *self._stop]
            scores = logits[len(self._shown) - 1 + at, ids].log_softmax(-1)
            total += float(scores[ids.index(action)])
        assert math.isfinite(total)
        return total

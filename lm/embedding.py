"""Sentences as vectors, by an encoder of transformers: how alike two sentences are in meaning.

The mean over a sentence's tokens of the last layer, scaled to length 1, which is what
sentence-transformers does for its general models, all-mpnet-base-v2 among them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from lm.hub import explained, require_folder_or_hub_id

_ROWS = 64


class SentenceEmbedder:
    """An encoder in Hugging Face format, a folder or a hub id; raises ModelNotFound."""

    def __init__(self, model: str) -> None:
        require_folder_or_hub_id(model)
        with explained(model, "the sentence encoder"):
            self._tokenizer = AutoTokenizer.from_pretrained(model)
            self._model = AutoModel.from_pretrained(model).eval()

    @torch.inference_mode()
    def embed(self, sentences: Sequence[str]) -> Tensor:
        """[N, H] vectors of length 1."""
        parts = []
        for start in range(0, len(sentences), _ROWS):
            batch = self._tokenizer(
                list(sentences[start : start + _ROWS]),
                padding=True,
                truncation=True,
                return_tensors="pt",
            )
            states_NTH = self._model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).last_hidden_state
            weight_NT1 = batch["attention_mask"][..., None].to(states_NTH.dtype)
            mean_NH = (states_NTH * weight_NT1).sum(1) / weight_NT1.sum(1)
            parts.append(torch.nn.functional.normalize(mean_NH, dim=-1))
        return torch.cat(parts)

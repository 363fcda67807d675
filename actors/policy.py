"""The policy as an actor holds it: the base with the adapter folded in, and our sampler."""

from collections.abc import Sequence

import torch

from lm.actions import ActionSpace
from lm.merged import MergedModel
from lm.model import LanguageModel
from lm.sampling import Completion, Request, Sampler, Tool


class SamplingPolicy:
    """Samples completions; takes new adapter weights between calls.

    Args:
        language_model: becomes this policy's own; its weights are rewritten by `load`.
        max_rows: completions under way at once.
        seed: of the random generator of this policy alone.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        actions: ActionSpace,
        tool: Tool | None,
        *,
        max_rows: int,
        seed: int,
    ) -> None:
        self._merged = MergedModel(language_model)
        self._sampler = Sampler(self._merged.model, actions, tool, max_rows=max_rows)
        device = next(self._merged.model.parameters()).device
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion for each request, in order."""
        return self._sampler.sample(requests, self._generator)

    def load(self, adapter: bytes) -> None:
        """Take up an adapter; see `MergedModel.load`."""
        self._merged.load(adapter)

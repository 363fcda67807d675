"""The policy as it was: the adapters of the last versions, to be put back for a moment."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lm.adapter import load_adapter_bytes

# Adapters of hundreds of megabytes belong to models whose hosts have this to spare.
_MAX_BYTES = 4 << 30


class PastPolicies:
    """Adapters that were published, by version: those no older than `max_age`, within a bound.

    Args:
        model: base and adapter. Only `as_of` changes it, and only until it ends.
        max_age: versions behind the newest.
        max_bytes: of all adapters; above it the oldest are dropped sooner.
    """

    def __init__(self, model: nn.Module, *, max_age: int, max_bytes: int = _MAX_BYTES) -> None:
        self._model = model
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._max_age = max_age
        self._max_bytes = max_bytes
        self._adapters: dict[int, bytes] = {}  # oldest first

    def __contains__(self, version: object) -> bool:
        return version in self._adapters

    def keep(self, version: int, adapter: bytes) -> None:
        """Remember what was published as `version`, the newest; forget what is too old for it."""
        self._adapters[version] = adapter
        num_bytes = sum(map(len, self._adapters.values()))
        while (oldest := next(iter(self._adapters))) != version:
            if oldest >= version - self._max_age and num_bytes <= self._max_bytes:
                break
            num_bytes -= len(self._adapters.pop(oldest))

    def save(self) -> dict[int, bytes]:
        """Every adapter that is kept, by version."""
        return dict(self._adapters)

    @contextmanager
    def as_of(self, version: int) -> Iterator[None]:
        """The model holds the weights of `version` inside, and its own again afterwards.

        Its own come back bit for bit, and in place: neither the optimizer nor an engine that
        shards its state learns of it. Raises KeyError for a version that is not kept.
        """
        adapter = self._adapters[version]
        own = [p.detach().clone() for p in self._trained]
        try:
            load_adapter_bytes(self._model, adapter)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._trained, own, strict=True):
                    parameter.copy_(value)

"""Micro-batches over the ranks of one replica: every rank makes the same number of passes."""

from collections.abc import Sequence
from dataclasses import replace
from time import monotonic
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lm.model import CausalLM
from reward.packed import edge_log_probs, score_limits
from reward.packing import MicroBatch, lay_out
from reward.request import ScoreItem, ScoreLimits

Edges = list[NDArray[np.float32]]


class PendingEdges(Protocol):
    """A share that another rank works on."""

    def result(self, timeout: float) -> Edges:
        """Its log-probabilities; raises what the rank raised, or TimeoutError."""
        ...


class Peer(Protocol):
    """Rank 1, 2, ..: another process."""

    def forward(self, share: Sequence[MicroBatch]) -> PendingEdges:
        """Start a share; returns at once."""
        ...


class Rank(Protocol):
    """Rank 0, which lives in the replica's own process."""

    @property
    def limits(self) -> ScoreLimits:
        """What the model can score."""
        ...

    def forward(self, share: Sequence[MicroBatch]) -> Edges:
        """Log-probabilities of all edges of each micro-batch."""
        ...


class UnshardedRank:
    """Rank 0 of a replica that has no other ranks: the whole frozen LM, without process group."""

    def __init__(self, model: CausalLM) -> None:
        self.limits: ScoreLimits = score_limits(model)
        self._model = model.eval().requires_grad_(False)

    def forward(self, share: Sequence[MicroBatch]) -> Edges:
        """Log-probabilities of all edges of each micro-batch."""
        return [edge_log_probs(self._model, batch) for batch in share]


# Stands where a rank has no micro-batch left: every pass is a collective of all ranks.
_FILLER = lay_out(
    [
        ScoreItem(
            context=np.zeros(1, dtype=np.int32),
            completion=np.zeros(0, dtype=np.int32),
            stops=np.zeros(1, dtype=np.int32),
            answer=np.zeros(1, dtype=np.int32),
        )
    ],
    token_budget=1,
).batches[0]


class Lockstep:
    """Rank 0 and its peers."""

    def __init__(self, rank: Rank, peers: Sequence[Peer], *, deadline_s: float) -> None:
        self.num_ranks = 1 + len(peers)
        self._rank = rank
        self._peers = peers
        self._deadline_s = deadline_s

    def forward(self, batches: Sequence[MicroBatch]) -> Edges:
        """Log-probabilities of all edges, one array per micro-batch, in the order given.

        Waits for the peers, at most for the deadline; rank 0's own wait for them inside a pass is
        bounded by its process group. Raises what a rank raises.
        """
        # In order of size, so that those which meet in one pass cost their ranks about the same.
        order = sorted(
            range(len(batches)),
            key=lambda number: (-batches[number].num_passes, -batches[number].num_tokens),
        )
        shares = deal([batches[number] for number in order], self.num_ranks)
        deadline = monotonic() + self._deadline_s
        pending = [peer.forward(share) for peer, share in zip(self._peers, shares[1:], strict=True)]
        results = [self._rank.forward(shares[0])]
        for number, handle in enumerate(pending, start=1):
            try:
                results.append(handle.result(max(0.0, deadline - monotonic())))
            except TimeoutError as error:
                raise TimeoutError(
                    f"rank {number} of {self.num_ranks} did not finish its share of "
                    f"{len(shares[number])} micro-batches within {self._deadline_s:.1f} s"
                ) from error
        edges: Edges = [np.zeros(0, dtype=np.float32)] * len(batches)
        for place, number in enumerate(order):
            edges[number] = results[place % self.num_ranks][place // self.num_ranks]
        return edges


def deal(batches: Sequence[MicroBatch], num_ranks: int) -> list[list[MicroBatch]]:
    """Shares of equal length, filled up where needed: batch b is round b // W of rank b % W.

    All batches of a round make as many passes as the one that needs most.
    """
    filled = [*batches, *[_FILLER] * (-len(batches) % num_ranks)]
    rounds = [filled[first : first + num_ranks] for first in range(0, len(filled), num_ranks)]
    in_step = [
        [replace(batch, min_passes=max(other.num_passes for other in meeting)) for batch in meeting]
        for meeting in rounds
    ]
    return [[meeting[rank] for meeting in in_step] for rank in range(num_ranks)]

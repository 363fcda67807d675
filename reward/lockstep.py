"""Micro-batches over the ranks of one replica: every rank makes the same number of passes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from time import monotonic
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lm.model import CausalLM
from lm.prefill import PromptStore
from reward.packed import edge_log_probs, score_limits
from reward.packing import MicroBatch, lay_out
from reward.request import ScoreItem, ScoreLimits

Edges = list[NDArray[np.float32]]  # log p of all edges of each micro-batch


class PendingEdges(Protocol):
    """A share that another rank works on."""

    def result(self, timeout: float) -> Edges:
        """What the rank gave or raised, else TimeoutError."""


class Peer(Protocol):
    """Rank 1, 2, ..: another process."""

    def forward(self, share: Sequence[MicroBatch]) -> PendingEdges: ...


class Rank(Protocol):
    """Rank 0, which lives in the replica's own process."""

    @property
    def limits(self) -> ScoreLimits: ...

    def forward(self, share: Sequence[MicroBatch]) -> Iterable[NDArray[np.float32]]:
        """Log p of all edges of each micro-batch, as soon as it is scored."""


class UnshardedRank:
    """Rank 0 of a replica that has no other ranks: the whole frozen LM, without process group."""

    def __init__(self, model: CausalLM) -> None:
        self.limits: ScoreLimits = score_limits(model)
        self._model = model.eval().requires_grad_(False)
        self._heads = PromptStore(model, max_prompts=1)  # for good: the model is frozen

    def forward(self, share: Sequence[MicroBatch]) -> Iterator[NDArray[np.float32]]:
        return (edge_log_probs(self._model, batch, self._heads) for batch in share)


# Stands where a rank has no micro-batch left: every pass is a collective of all ranks.
_FILLER = lay_out([ScoreItem.of([0], [], stops=[0], answer=[0])], token_budget=1).batches[0]


def forward_in_step(
    rank: Rank,
    peers: Sequence[Peer],
    batches: Sequence[MicroBatch],
    *,
    deadline_s: float,
    scored: Callable[[], None] = lambda: None,
) -> Edges:
    """Edges of the micro-batches in the order given; raises what a rank raises.

    Waits for the peers at most for the deadline once this rank is done, inside a pass for the
    process group's timeout. Calls `scored` behind each of this rank's micro-batches, which are in
    step with those of the others.
    """
    num_ranks = 1 + len(peers)
    # In order of size, so that those which meet in one pass cost their ranks about the same.
    order = sorted(
        range(len(batches)),
        key=lambda number: (-batches[number].num_passes, -batches[number].num_tokens),
    )
    shares = deal([batches[number] for number in order], num_ranks)
    pending = [peer.forward(share) for peer, share in zip(peers, shares[1:], strict=True)]
    mine: Edges = []
    for edges in rank.forward(shares[0]):
        mine.append(edges)
        scored()
    results, deadline = [mine], monotonic() + deadline_s
    for number, handle in enumerate(pending, start=1):
        try:
            results.append(handle.result(max(0.0, deadline - monotonic())))
        except TimeoutError as error:
            raise TimeoutError(
                f"rank {number} of {num_ranks} did not finish its share of "
                f"{len(shares[number])} micro-batches within {deadline_s:.1f} s of ours"
            ) from error
    found = {n: results[at % num_ranks][at // num_ranks] for at, n in enumerate(order)}
    return [found[number] for number in range(len(batches))]


def deal(batches: Sequence[MicroBatch], num_ranks: int) -> list[list[MicroBatch]]:
    """Shares of equal length, filled up where needed: batch b is round b // W of rank b % W.

    All batches of a round make as many passes as the one that needs most.
    """
    filled = [*batches, *[_FILLER] * (-len(batches) % num_ranks)]
    shares: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    for first in range(0, len(filled), num_ranks):
        meeting = filled[first : first + num_ranks]
        passes = max(batch.num_passes for batch in meeting)
        for share, batch in zip(shares, meeting, strict=True):
            share.append(replace(batch, min_passes=passes))
    return shares

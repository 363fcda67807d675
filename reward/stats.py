"""What a reward replica counts."""

from collections.abc import Sequence
from dataclasses import dataclass

from reward.packing import Plan
from reward.request import ScoreItem


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStats:
    """Counts since the replica's start, and its queue now."""

    queued_requests: int
    queued_items: int
    queued_s: float  # in the queue, summed over requests
    answered_requests: int
    answered_items: int
    computed_items: int  # the rest of the answered ones was remembered or asked for twice
    computed_tokens: int  # of padded passes
    expired_requests: int  # spent their deadline in the queue
    failed_requests: int
    waiting_s: float  # without requests
    computing_s: float
    tokens_per_s: float  # while computing


@dataclass(slots=True)
class Ledger:
    """Counters of the worker thread; reading them while it writes is harmless."""

    queued_s: float = 0.0
    answered_requests: int = 0
    answered_items: int = 0
    computed_items: int = 0
    computed_tokens: int = 0
    expired_requests: int = 0
    failed_requests: int = 0
    waiting_s: float = 0.0
    computing_s: float = 0.0

    def computed(self, items: Sequence[ScoreItem], layout: Plan) -> None:
        """Count one round of passes."""
        self.computed_items += len(items)
        self.computed_tokens += sum(batch.num_tokens for batch in layout.batches)

    def answered(self, num_items: int) -> None:
        """Count one request."""
        self.answered_requests += 1
        self.answered_items += num_items

    def stats(self, *, queued_requests: int, queued_items: int) -> ReplicaStats:
        """The counters as they are, with the queue as given."""
        return ReplicaStats(
            queued_requests=queued_requests,
            queued_items=queued_items,
            queued_s=self.queued_s,
            answered_requests=self.answered_requests,
            answered_items=self.answered_items,
            computed_items=self.computed_items,
            computed_tokens=self.computed_tokens,
            expired_requests=self.expired_requests,
            failed_requests=self.failed_requests,
            waiting_s=self.waiting_s,
            computing_s=self.computing_s,
            tokens_per_s=self.computed_tokens / max(self.computing_s, 1e-9),
        )

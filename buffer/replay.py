"""The replay buffer: actors add groups of trajectories, the learner draws them."""

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import redis

from buffer.audit import Audit, audit_store
from buffer.config import BufferConfig
from buffer.reader import KEPT_EVIDENCE, Reader
from buffer.sampler import BufferStarved, Group, Outlet
from buffer.stats import ReplayStats, read_stats
from buffer.store import Store
from buffer.trajectory import Trajectory
from buffer.writer import AddReport, BufferContended, Intake, total

__all__ = [
    "AddReport",
    "Audit",
    "BufferContended",
    "BufferStarved",
    "Group",
    "ReplayBuffer",
    "ReplayStats",
]

log_warning = logging.getLogger("buffer").warning


class ReplayBuffer:
    """Two indexes over one store, filled by one atomic add.

    *Fresh* holds whole groups until the learner has drawn them `max_draws` times, they are older
    than `max_age` policy versions, or `fresh_capacity` fresher ones wait. *Replay* holds each
    trajectory once and, per prompt, the best ones that are not alike (`buffer.admission`).

    Safe to share between threads. An add that was not acknowledged may be repeated as it is: the
    store knows a group by its bytes and counts it once; two groups that are alike in all else
    differ in `created_s`. A draw is delivered at most once.
    Every method raises BufferUnreachable when Redis is gone for longer than the client's timeout.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        run: str,
        config: BufferConfig,
        warn: Callable[[str], None] = log_warning,
    ) -> None:
        self._store = Store(client, run=run)
        self._reader = Reader(self._store, warn=warn)
        self._intake = Intake(self._store, self._reader, config)
        self._outlet = Outlet(self._store, self._reader, config)
        self._config = config

    def add(self, group: Sequence[Trajectory]) -> AddReport:
        """Accept the trajectories that one actor drew for one prompt: all of them or none.

        Once this returns they survive the death of this process and, with `appendfsync always`,
        that of the server.
        """
        return self._intake.accept(group, queue=True)

    def seed(self, trajectories: Sequence[Trajectory]) -> AddReport:
        """Put trajectories of any prompts, such as demonstrations, into replay only."""
        by_prompt: dict[str, list[Trajectory]] = {}
        for trajectory in trajectories:
            by_prompt.setdefault(trajectory.prompt_key, []).append(trajectory)
        return total([self._intake.accept(same, queue=False) for same in by_prompt.values()])

    def draw(
        self,
        *,
        num_groups: int,
        num_replayed: int,
        version: int,
        rng: np.random.Generator,
        timeout_s: float,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Group]:
        """The freshest groups, each joined by up to `num_replayed` draws from its prompt's replay.

        Freshest is the highest policy version, then the latest arrival. The age of a group is
        `version` less the lowest policy version in it. Replay is drawn by softmax of
        inverse_temperature * terminal log-reward, without replacement within a group.

        Blocks until `num_groups` groups are eligible; raises BufferStarved after `timeout_s`.
        Gives none once `stop()` holds while it blocks.
        """
        fresh = self._outlet.fresh(num_groups, version=version, timeout_s=timeout_s, stop=stop)
        prompts = [group[0].prompt_key for group in fresh]
        replayed = self._outlet.replayed(prompts, num_replayed=num_replayed, rng=rng)
        return [
            Group(prompt_key=prompt, fresh=group, replayed=again)
            for prompt, group, again in zip(prompts, fresh, replayed, strict=True)
        ]

    @property
    def waited_s(self) -> float:
        """Seconds that all draws of this client have waited for groups."""
        return self._outlet.waited_s

    def discard(self, trajectories: Sequence[Trajectory]) -> None:
        """Take drawn trajectories out of replay for good; they count as quarantined."""
        for trajectory in trajectories:
            self._store.call(
                "quarantine", "item", trajectory.id, trajectory.prompt_key, KEPT_EVIDENCE
            )

    def depth(self) -> int:
        """Fresh groups that the learner has not drawn yet: what actors pace on."""
        return int(self._store.read("ZCARD", "undrawn"))

    def stats(self) -> ReplayStats:
        """Sizes, ages, times sampled, and what has happened to everything accepted."""
        return read_stats(self._store)

    def audit(self) -> Audit:
        """Recount everything from the data itself; reads the whole buffer."""
        return audit_store(self._store, self._config)

    def trajectories(self) -> Iterator[Trajectory]:
        """Everything in replay, prompt by prompt, the best of each prompt first."""
        for prompt in sorted(self._store.read("HKEYS", "revision")):
            yield from reversed(self._reader.prompt(prompt.decode()).trajectories.values())

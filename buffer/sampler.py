"""Giving groups out: the freshest, each with draws from the replay of its prompt."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from redis.client import Pipeline

from buffer.config import BufferConfig
from buffer.priority import sample_by_priority
from buffer.reader import Reader
from buffer.store import Store
from buffer.trajectory import Trajectory

POLL_S = 0.01


class BufferStarved(TimeoutError):
    """Too few fresh groups came in for too long."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Trajectories of one prompt for one update."""

    prompt_key: str
    fresh: tuple[Trajectory, ...]  # as one actor drew them, multiplicity and all
    replayed: tuple[Trajectory, ...]  # drawn by priority, each at most once


class Outlet:
    """The reading side of the buffer."""

    def __init__(self, store: Store, reader: Reader, config: BufferConfig) -> None:
        self._store = store
        self._reader = reader
        self._config = config
        self.waited_s = 0.0  # for groups, in all calls of `fresh`

    def fresh(
        self, num_groups: int, *, version: int, timeout_s: float, stop: Callable[[], bool]
    ) -> list[tuple[Trajectory, ...]]:
        """The freshest eligible groups; waits for enough of them, else raises BufferStarved.

        None at all once `stop()` holds in a wait.
        """
        if num_groups > self._config.fresh_capacity:
            raise ValueError(
                f"{num_groups} groups can never wait at once where buffer.fresh_capacity is"
                f" {self._config.fresh_capacity}; raise the latter"
            )
        limits = (version, self._config.max_age, self._config.max_draws)
        started_s = time.monotonic()
        groups: list[tuple[Trajectory, ...]] = []
        while missing := num_groups - len(groups):
            asked_s = time.monotonic()
            eligible, drawn = self._store.call("draw", missing, *limits)
            for seq, payload in zip(drawn[::2], drawn[1::2], strict=True):
                if (group := self._reader.group(seq, payload)) is not None:
                    groups.append(group)
            if drawn:
                continue
            if stop():
                return []
            waited_s = time.monotonic() - started_s
            if waited_s >= timeout_s:
                raise BufferStarved(self._shortage(eligible, missing, version, waited_s))
            time.sleep(POLL_S)
            self.waited_s += time.monotonic() - asked_s
        return groups

    def replayed(
        self, prompts: Sequence[str], *, num_replayed: int, rng: np.random.Generator
    ) -> list[tuple[Trajectory, ...]]:
        """For each prompt, up to `num_replayed` different trajectories by priority.

        One that another writer replaces between choosing and fetching is left out.
        """
        if not prompts or num_replayed == 0:
            return [() for _ in prompts]

        def rank(pipeline: Pipeline) -> None:
            for prompt in prompts:
                pipeline.zrange(self._store.key(f"prompt:{prompt}"), 0, -1, withscores=True)

        chosen = []
        for prompt, ranked in zip(prompts, self._store.pipeline(rank), strict=True):
            picks = sample_by_priority(
                np.array([log_reward for _, log_reward in ranked]),
                num_draws=num_replayed,
                inverse_temperature=self._config.inverse_temperature,
                rng=rng,
            )
            chosen.append([(ranked[pick][0].decode(), prompt) for pick in picks])
        flat = [pair for pairs in chosen for pair in pairs]
        payloads = iter(self._store.call("fetch", *(id for id, _ in flat)))
        return [
            tuple(
                trajectory
                for id, prompt in pairs
                if (payload := next(payloads)) is not None
                and (trajectory := self._reader.item(id, prompt, payload)) is not None
            )
            for pairs in chosen
        ]

    def _shortage(self, eligible: int, missing: int, version: int, waited_s: float) -> str:
        """Why a draw gave up, in numbers."""
        names = ("accepted", "drawn", "exhausted", "expired", "dropped", "quarantined")
        counts = self._store.read("HMGET", "meta", *(f"groups_{name}" for name in names))
        history = ", ".join(
            f"{int(count or 0)} {name}" for name, count in zip(names, counts, strict=True)
        )
        return (
            f"{eligible} of {missing} fresh groups eligible at policy version {version} after"
            f" {waited_s:.1f} s (max_age {self._config.max_age}, max_draws"
            f" {self._config.max_draws}; groups so far: {history}) at {self._store.place}."
            " Are the actors alive and scored? If most groups expired, raise buffer.max_age"
        )

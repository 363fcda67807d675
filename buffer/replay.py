"""The replay buffer: actors add groups of trajectories, the learner draws them."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from buffer.audit import Audit, audit_contents
from buffer.config import BufferConfig
from buffer.stats import ReplayStats
from buffer.store import Reader, Store
from buffer.trajectory import MalformedTrajectory, Trajectory, unpack_group
from buffer.writer import AddReport, accept, total

log_warning = logging.getLogger("buffer").warning
POLL_S = 0.01


class BufferStarved(TimeoutError):
    """Too few fresh groups came in for too long."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Trajectories of one prompt for one update."""

    prompt_key: str
    fresh: tuple[Trajectory, ...]  # as one actor drew them, multiplicity and all
    replayed: tuple[Trajectory, ...]  # drawn by priority, each at most once


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DrawRequest:
    """What the learner wants of one draw."""

    num_groups: int
    num_replayed: int  # at most, for each group, from its prompt's replay
    version: int  # of the learner's weights: ages count from here
    rng: np.random.Generator  # chooses what is replayed
    timeout_s: float  # longest wait for groups
    stop: Callable[[], bool] = lambda: False  # ends a wait


class Replay(Protocol):
    """Where the learner's groups come from."""

    def draw(self, request: DrawRequest) -> list[Group]:
        """As many groups as requested; none once `stop()` holds in a wait.

        Raises:
            BufferStarved: too few came within `timeout_s`.
        """

    def discard(self, trajectories: Sequence[Trajectory]) -> None:
        """Take drawn trajectories out of replay for good."""


class ReplayBuffer:
    """A `Replay` with two indexes over one store, filled by one atomic add.

    *Fresh* holds whole groups until the learner has drawn them `max_draws` times, they are older
    than `max_age` policy versions, or `fresh_capacity` fresher ones wait. *Replay* holds each
    trajectory once and, per prompt, the best ones that are not alike (`buffer.admission`).

    Safe to share between threads. An add that was not acknowledged may be repeated as it is: the
    store knows a group by its bytes and counts it once; two groups that are alike in all else
    differ in `created_s`. A draw is delivered at most once.
    On Redis every method raises BufferUnreachable when the server is gone for longer than the
    client's timeout.

    Args:
        warn: takes one line for people when something stored cannot be read.
    """

    def __init__(
        self, store: Store, *, config: BufferConfig, warn: Callable[[str], None] = log_warning
    ) -> None:
        self._store = store
        self._reader = Reader(store, warn=warn)
        self._config = config
        self.waited_s = 0.0  # for groups, in all draws of this client

    def add(self, group: Sequence[Trajectory]) -> AddReport:
        """Accept the trajectories that one actor drew for one prompt: all of them or none.

        Once this returns they survive the death of this process and, on a Redis with
        `appendfsync always`, that of the server.
        """
        return accept(group, self._store, self._reader, self._config, queue=True)

    def seed(self, trajectories: Sequence[Trajectory]) -> AddReport:
        """Put trajectories of any prompts, such as demonstrations, into replay only.

        Nothing that is stored changes or makes way for them; those whose id is stored already are
        not counted.
        """
        by_prompt: dict[str, list[Trajectory]] = {}
        for trajectory in trajectories:
            by_prompt.setdefault(trajectory.prompt_key, []).append(trajectory)
        parts = (self._store, self._reader, self._config)
        return total([accept(group, *parts, queue=False) for group in by_prompt.values()])

    def draw(self, request: DrawRequest) -> list[Group]:
        """The freshest groups, each joined by up to `num_replayed` draws from its prompt's replay.

        Freshest is the highest policy version, then the latest arrival. The age of a group is
        `version` less the lowest policy version in it. Replay is drawn by softmax of
        inverse_temperature * terminal log-reward, without replacement within a group.

        Blocks until `num_groups` groups are eligible; raises BufferStarved after `timeout_s`.
        Gives none once `stop()` holds while it blocks.
        """
        fresh = self._fresh(request)
        prompts = [group[0].prompt_key for group in fresh]
        replayed = self._replayed(prompts, request.num_replayed, request.rng)
        return [
            Group(prompt_key=prompt, fresh=group, replayed=again)
            for prompt, group, again in zip(prompts, fresh, replayed, strict=True)
        ]

    def discard(self, trajectories: Sequence[Trajectory]) -> None:
        """Take drawn trajectories out of replay for good; they count as quarantined."""
        for trajectory in trajectories:
            self._store.quarantine_item(trajectory.id, trajectory.prompt_key)

    def newest(self) -> Sequence[Trajectory]:
        """Trajectories of one prompt, to look at: the freshest group that waits for the learner.

        Where none waits, what replay holds of some prompt, the newest first; none before there is
        anything.
        """
        payload = self._store.newest_group()
        if payload is not None:
            with suppress(MalformedTrajectory):  # whoever draws it puts it into quarantine
                return unpack_group(payload)
        prompts = self._store.prompts()
        if not prompts:
            return ()
        chosen = prompts[np.random.default_rng().integers(len(prompts))]
        stored = self._reader.trajectories(chosen)
        return sorted(stored, key=lambda trajectory: trajectory.created_s, reverse=True)

    def depth(self) -> int:
        """Fresh groups that the learner has not drawn yet: what actors pace on."""
        return self._store.depth()

    def stats(self) -> ReplayStats:
        """Sizes, ages, times sampled, and what has happened to everything accepted."""
        return self._store.stats()

    def audit(self) -> Audit:
        """Recount everything from the data itself; reads the whole buffer."""
        return audit_contents(self._store.contents(), self._config)

    def trajectories(self) -> Iterator[Trajectory]:
        """Everything in replay, prompt by prompt, the best of each prompt first."""
        for prompt in self._store.prompts():
            yield from reversed(self._reader.trajectories(prompt))

    def _fresh(self, request: DrawRequest) -> list[tuple[Trajectory, ...]]:
        """The freshest eligible groups; none at all once `stop()` holds in a wait."""
        config, num_groups = self._config, request.num_groups
        if num_groups > config.fresh_capacity:
            raise ValueError(
                f"{num_groups} groups can never wait at once where buffer.fresh_capacity is"
                f" {config.fresh_capacity}; raise the latter"
            )
        started_s = time.monotonic()
        groups: list[tuple[Trajectory, ...]] = []
        while missing := num_groups - len(groups):
            asked_s = time.monotonic()
            eligible, drawn = self._store.draw(missing, request.version, config)
            for number, payload in drawn:
                if (group := self._reader.group(number, payload)) is not None:
                    groups.append(group)
            if drawn:
                continue
            if request.stop():
                return []
            waited_s = time.monotonic() - started_s
            if waited_s >= request.timeout_s:
                raise BufferStarved(self._shortage(eligible, missing, request.version, waited_s))
            time.sleep(POLL_S)
            self.waited_s += time.monotonic() - asked_s
        return groups

    def _replayed(
        self, prompts: Sequence[str], num_replayed: int, rng: np.random.Generator
    ) -> list[tuple[Trajectory, ...]]:
        """For each prompt, up to `num_replayed` different trajectories by priority.

        One that another writer replaces between choosing and fetching is left out.
        """
        if not prompts or num_replayed == 0:
            return [() for _ in prompts]
        chosen = []
        for prompt, ranked in zip(prompts, self._store.rank(prompts), strict=True):
            picks = sample_by_priority(
                np.array([log_reward for _, log_reward in ranked]),
                num_draws=num_replayed,
                inverse_temperature=self._config.inverse_temperature,
                rng=rng,
            )
            chosen.append([(ranked[pick][0], prompt) for pick in picks])
        payloads = iter(self._store.fetch([id for pairs in chosen for id, _ in pairs]))
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
        counters = self._store.stats().counters
        names = ("accepted", "drawn", "exhausted", "expired", "dropped", "quarantined")
        history = ", ".join(f"{getattr(counters, f'groups_{name}')} {name}" for name in names)
        return (
            f"{eligible} of {missing} fresh groups eligible at policy version {version} after"
            f" {waited_s:.1f} s (max_age {self._config.max_age}, max_draws"
            f" {self._config.max_draws}; groups so far: {history}) at {self._store.place}."
            " Are the actors alive and scored? If most groups expired, raise buffer.max_age"
        )


def sample_by_priority(
    log_reward_N: NDArray[np.float64],
    *,
    num_draws: int,
    inverse_temperature: float,
    rng: np.random.Generator,
) -> NDArray[np.intp]:
    """Positions of `num_draws` different items, fewer if there are fewer.

    Successive draws without replacement, each with probability proportional to
    exp(inverse_temperature * log_reward) among those left. Adding Gumbel noise and taking the
    largest gives exactly this law (Yellott 1977), in one pass and without a normaliser.
    """
    noisy_N = inverse_temperature * log_reward_N + rng.gumbel(size=log_reward_N.shape)
    return np.argsort(-noisy_N)[:num_draws]

"""The replay buffer: actors add groups of trajectories, the learner draws them."""

import hashlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from buffer.admission import Item, lengths_near, plan
from buffer.config import BufferConfig
from buffer.stats import ReplayStats
from buffer.store import Arrival, Fate, Reader, Store
from buffer.trajectory import (
    MAX_GROUP,
    MalformedTrajectory,
    Trajectory,
    pack,
    pack_group,
    unpack,
    unpack_group,
)

log_warning = logging.getLogger("buffer").warning
POLL_S = 0.01
MAX_CONFLICTS = 200


class BufferStarved(TimeoutError):
    """Too few fresh groups came in for too long."""


class BufferContended(RuntimeError):
    """Other writers changed one prompt again and again between our reading and writing it."""


class AddReport(NamedTuple):
    """What one add did. Replaced and evicted items may have come with earlier ones."""

    counts: Counter[str]  # by the names of `buffer.stats.Counters`
    fate: Fate  # of the group
    conflicts: int  # times another writer was faster


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
        """As many groups as requested, else BufferStarved; none once `stop()` holds in a wait."""

    def discard(self, trajectories: Sequence[Trajectory]) -> None:
        """Take drawn trajectories out of replay for good; they count as quarantined."""


class ReplayBuffer:
    """A `Replay` with two indexes over one store, filled by one atomic add.

    *Fresh* holds whole groups until the learner has drawn them `max_draws` times, they are older
    than `max_age` policy versions, or `fresh_capacity` fresher ones wait. *Replay* holds each
    trajectory once and, per prompt, the best ones that are not alike (`buffer.admission`).

    Safe to share between threads. An add that was not acknowledged may be repeated as it is: the
    store knows a group by its bytes and counts it once; two groups that are alike in all else
    differ in `created_s`. A draw is delivered at most once. A Redis that is gone for longer than
    its timeout is BufferUnreachable. `warn` takes a line when something stored cannot be read.
    """

    def __init__(
        self, store: Store, *, config: BufferConfig, warn: Callable[[str], None] = log_warning
    ) -> None:
        self.store = store
        self._reader = Reader(store, warn=warn)
        self.config = config
        self.waited_s = 0.0  # for groups, in all draws of this client

    def add(self, group: Sequence[Trajectory]) -> AddReport:
        """Accept the trajectories that one actor drew for one prompt: all of them or none.

        Then they survive the death of this process and, with `appendfsync always`, of the server.
        """
        return self._accept(group, queue=True)

    def seed(self, trajectories: Sequence[Trajectory]) -> Counter[str]:
        """Put trajectories of any prompts, such as demonstrations, into replay only; the counts.

        Nothing stored changes or makes way for them; those whose id is stored are not counted.
        """
        by_prompt: dict[str, list[Trajectory]] = defaultdict(list)
        for trajectory in trajectories:
            by_prompt[trajectory.prompt_key].append(trajectory)
        counts = Counter[str]()
        for group in by_prompt.values():
            counts.update(self._accept(group, queue=False).counts)
        return counts

    def draw(self, request: DrawRequest) -> list[Group]:
        """The freshest groups, each joined by up to `num_replayed` draws from its prompt's replay.

        Freshest is the highest policy version, then the latest arrival. The age of a group is
        `version` less the lowest policy version in it. Replay is drawn by `sample_by_priority`.
        """
        fresh = self._fresh(request)
        prompts = [group[0].prompt_key for group in fresh]
        replayed = self._replayed(prompts, request.num_replayed, request.rng)
        return [
            Group(prompt_key=prompt, fresh=group, replayed=again)
            for prompt, group, again in zip(prompts, fresh, replayed, strict=True)
        ]

    def discard(self, trajectories: Sequence[Trajectory]) -> None:
        for trajectory in trajectories:
            self.store.quarantine_item(trajectory.id, trajectory.prompt_key)

    def newest(self) -> Sequence[Trajectory]:
        """Trajectories of one prompt, to look at: the freshest group that waits for the learner.

        Where none waits, what replay holds of some prompt, the newest first; none before there is
        anything.
        """
        # Whoever draws what is damaged puts it into quarantine.
        with suppress(MalformedTrajectory):
            if (payload := self.store.newest_group()) is not None:
                return unpack_group(payload)
        if not (prompts := self.store.prompts()):
            return ()
        chosen = prompts[np.random.default_rng().integers(len(prompts))]
        return sorted(self.held([chosen]), key=lambda each: each.created_s, reverse=True)

    def held(self, prompts: Sequence[str]) -> list[Trajectory]:
        """What replay holds of these prompts, to look at; what cannot be read is left out."""
        stored = []
        ids = [id for ranked in self.store.rank(prompts) for id, _ in ranked]
        for payload in self.store.peek(ids):
            with suppress(MalformedTrajectory):
                stored.append(unpack(payload or b""))
        return stored

    def depth(self) -> int:
        """Fresh groups that the learner has not drawn yet: what actors pace on."""
        return self.store.depth()

    def stats(self) -> ReplayStats:
        return self.store.stats()

    def _accept(self, group: Sequence[Trajectory], *, queue: bool) -> AddReport:
        """Plan on what is stored of the prompt, commit if it still is, else plan again.

        Without `queue` the group goes to replay alone, as `seed` says.
        """
        if not 1 <= len(group) <= MAX_GROUP:
            raise ValueError(f"a group has 1 to {MAX_GROUP} trajectories, not {len(group)}")
        if len({trajectory.prompt_key for trajectory in group}) != 1:
            raise ValueError("a group has trajectories of exactly one prompt")
        prompt, tolerance = group[0].prompt_key, self.config.near_duplicate_tolerance
        newcomers = [Item(t.id, t.completion, t.terminal_log_reward, pack(t)) for t in group]
        lengths = lengths_near([t.completion.size for t in group], tolerance=tolerance)
        arrival = arrival_of(group, newcomers) if queue else None
        for conflicts in range(MAX_CONFLICTS):
            revision, stored = self._reader.prompt(prompt, lengths)
            change = plan(prompt, revision, stored, newcomers, self.config, keep_stored=not queue)
            fate, evicted = self.store.commit(change, arrival, self.config)
            if fate == "repeated":
                return AddReport(Counter(), fate, conflicts)
            if fate != "conflict":
                counts = change.counts + Counter(evicted_capacity=evicted)
                return AddReport(counts, fate, conflicts)
        raise BufferContended(
            f"prompt {prompt!r} changed {MAX_CONFLICTS} times while a group of {len(group)} was"
            f" being added at {self.store.place}. Let fewer actors share a prompt"
        )

    def _fresh(self, request: DrawRequest) -> list[tuple[Trajectory, ...]]:
        """The freshest eligible groups; none at all once `stop()` holds in a wait."""
        config, num_groups = self.config, request.num_groups
        if num_groups > config.fresh_capacity:
            raise ValueError(
                f"{num_groups} groups can never wait at once where buffer.fresh_capacity is"
                f" {config.fresh_capacity}; raise the latter"
            )
        started_s = time.monotonic()
        groups: list[tuple[Trajectory, ...]] = []
        while missing := num_groups - len(groups):
            asked_s = time.monotonic()
            eligible, drawn = self.store.draw(missing, request.version, config)
            read = (self._reader.group(number, payload) for number, payload in drawn)
            groups += (group for group in read if group is not None)
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
        """For each prompt, draws by priority, without what was replaced since it was chosen."""
        if not num_replayed:
            return [()] * len(prompts)
        chosen = []
        for prompt, ranked in zip(prompts, self.store.rank(prompts), strict=True):
            picks = sample_by_priority(
                np.array([log_reward for _, log_reward in ranked]),
                num_draws=num_replayed,
                inverse_temperature=self.config.inverse_temperature,
                rng=rng,
            )
            chosen.append([(ranked[pick][0], prompt) for pick in picks])
        payloads = iter(self.store.fetch([id for pairs in chosen for id, _ in pairs]))
        found = [
            [
                self._reader.item(id, prompt, data)
                for id, prompt in pairs
                if (data := next(payloads)) is not None
            ]
            for pairs in chosen
        ]
        return [tuple(each for each in group if each is not None) for group in found]

    def _shortage(self, eligible: int, missing: int, version: int, waited_s: float) -> str:
        """Why a draw gave up, in numbers."""
        counters = self.store.stats().counters
        names = ("accepted", "drawn", "exhausted", "expired", "dropped", "quarantined")
        history = ", ".join(f"{getattr(counters, f'groups_{name}')} {name}" for name in names)
        return (
            f"{eligible} of {missing} fresh groups eligible at policy version {version} after"
            f" {waited_s:.1f} s (max_age {self.config.max_age}, max_draws"
            f" {self.config.max_draws}; groups so far: {history}) at {self.store.place}."
            " Are the actors alive and scored? If most groups expired, raise buffer.max_age"
        )


def arrival_of(group: Sequence[Trajectory], newcomers: Sequence[Item]) -> Arrival:
    """The group as it waits for the learner."""
    payload = pack_group([item.payload for item in newcomers])
    digest = hashlib.blake2b(payload, digest_size=16).hexdigest()
    return Arrival(digest, min(trajectory.policy_version for trajectory in group), payload)


def sample_by_priority(
    log_reward_N: NDArray[np.float64],
    *,
    num_draws: int,
    inverse_temperature: float,
    rng: np.random.Generator,
) -> NDArray[np.intp]:
    """Positions of up to `num_draws` items, drawn one after another without replacement.

    Each by exp(inverse_temperature * log_reward) among those left: the law of the largest under
    Gumbel noise (Yellott 1977).
    """
    noisy_N = inverse_temperature * log_reward_N + rng.gumbel(size=log_reward_N.shape)
    return np.argsort(-noisy_N)[:num_draws]

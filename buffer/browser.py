"""Looking at a replay buffer without changing it, in portions that hold nobody up."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import redis

from buffer.connection import naming_errors
from buffer.redis_store import RedisStore
from buffer.stats import ReplayStats
from buffer.trajectory import MalformedTrajectory, Trajectory, read_array, unpack

# Entries that one command reads: the server answers others in between.
PORTION = 500
_SUMMARIES_AT_ONCE = 100  # the server opens each payload
_TALLIES = ("sampled", "duplicates", "near_replaced")


class Tally(NamedTuple):
    """What has happened to one trajectory since it was stored; fields as in `_TALLIES`."""

    draws: int = 0  # from replay, by the learner
    duplicates: int = 0  # times it came again
    near_replaced: int = 0  # near-duplicates that made way for it


@dataclass(frozen=True, slots=True)
class Summary:
    """The small fields of one stored trajectory."""

    id: str
    task: str
    prompt_key: str
    num_tokens: int  # of the completion, the tool's included
    used_tool: bool  # a tool inserted some of them
    log_reward: float  # nats, untempered, of the whole completion
    version: int
    created_s: float  # unix seconds
    correct: bool | None

    @classmethod
    def of(cls, trajectory: Trajectory) -> "Summary":
        """Read from the whole record."""
        return cls(
            id=trajectory.id,
            task=trajectory.task,
            prompt_key=trajectory.prompt_key,
            num_tokens=trajectory.completion.size,
            used_tool=bool(trajectory.from_tool.any()),
            log_reward=trajectory.terminal_log_reward,
            version=trajectory.policy_version,
            created_s=trajectory.created_s,
            correct=trajectory.correct,
        )


class ReplayBrowser:
    """The replay of a run for people to look at: only reads, and may be shared between threads.

    Every method raises BufferUnreachable when Redis is gone for longer than the client's timeout.
    """

    def __init__(self, client: redis.Redis, *, run: str) -> None:
        self._store = RedisStore(client, run=run)

    def stats(self) -> ReplayStats:
        return self._store.stats()

    def revisions(self) -> dict[str, int]:
        """For every prompt a number that moves whenever what is stored for it changes."""
        return {prompt.decode(): int(revision) for prompt, revision in self._scan("revision")}

    def tallies(self) -> dict[str, Tally]:
        """By id, of everything that has any tally."""
        columns = [dict(self._scan(name)) for name in _TALLIES]
        return {
            id.decode(): Tally(*(int(column.get(id, 0)) for column in columns))
            for id in set[bytes]().union(*columns)
        }

    def tallies_of(self, ids: Sequence[str]) -> dict[str, Tally]:
        """By id, as of one instant."""
        columns = self._store.read(*(("HMGET", name, *ids) for name in _TALLIES)) if ids else [[]]
        return {
            id: Tally(*(int(count or 0) for count in counts))
            for id, *counts in zip(ids, *columns, strict=True)
        }

    def ids(self, prompts: Sequence[str]) -> list[list[str]]:
        """For each prompt, the ids of what is stored for it."""
        return [[id for id, _ in ranked] for ranked in self._store.rank(prompts)]

    def summaries(self, ids: Sequence[str]) -> Iterator[Summary]:
        """Small fields of what is stored, read where it lies; without what is gone or damaged."""
        for start in range(0, len(ids), _SUMMARIES_AT_ONCE):
            portion = ids[start : start + _SUMMARIES_AT_ONCE]
            for id, data in zip(portion, self._store.call("summary", *portion), strict=True):
                with suppress(MalformedTrajectory):
                    if data is not None:
                        yield _summary(id, data)

    def trajectories(self, ids: Sequence[str]) -> Iterator[Trajectory]:
        """What is stored under the ids; without those that are gone or cannot be read."""
        for start in range(0, len(ids), PORTION):
            for payload in self._store.peek(ids[start : start + PORTION]):
                # The next to read a damaged one for use puts it into quarantine and says so.
                with suppress(MalformedTrajectory):
                    if payload is not None:
                        yield unpack(payload)

    def _scan(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        """Fields of a hash, portion by portion."""
        with naming_errors(self._store.place, phase="reading"):
            yield from self._store.client.hscan_iter(self._store.key(name), count=PORTION)


def _summary(id: str, data: bytes) -> Summary:
    """Read what summary.lua wrote; raises MalformedTrajectory for fields that cannot be."""
    fields = read_array(data, max_len=8)
    kinds: tuple[Any, ...] = (str, str, int, bool, (int, float), int, (int, float), (bool, str))
    if len(fields) != len(kinds) or not all(map(isinstance, fields, kinds)):
        raise MalformedTrajectory(f"no summary of a trajectory: {data!r:.80}")
    task, prompt, length, by_tool, log_reward, version, time, correct = fields
    graded = correct if isinstance(correct, bool) else None
    return Summary(
        id, task, prompt, length, by_tool, float(log_reward), version, float(time), graded
    )

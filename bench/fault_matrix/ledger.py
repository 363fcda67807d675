"""The buffer's books, kept by somebody else: what it acknowledged, and what is there afterwards.

A witness of its own stores a trajectory a few times a second, all job long, and notes each one
that the buffer has acknowledged: every one must be there for ever after. What the actors store
moves on, so it is held to its count: of what was there, only as much may be gone as the buffer
counts as gone. Groups are watched, so that one which was taken in twice is seen even if the
learner has drawn it since.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import redis

from bench.audit import Contents, audit_contents, contents_of
from bench.fault_matrix.job import RUN, GaveUp, Job
from buffer.config import BufferConfig
from buffer.connection import connect
from buffer.redis_store import RedisStore
from buffer.replay import ReplayBuffer
from buffer.server import reach
from buffer.stats import LEAVING_FRESH, Counters
from buffer.trajectory import Trajectory
from cluster.run.metrics_log import read_metrics

# A duplicate or a near-duplicate that was refused never took a place.
TAKEN_OUT = ("near_replaced", "evicted_quota", "evicted_capacity", "quarantined")
_BEAT_S = 0.3
_LOOK_EVERY = 4  # beats
_ANSWER_S = 5.0
_LOOK_S = 60.0  # longest wait for a buffer that answers


class Ledger:
    """Watches the buffer of one job, until `close`."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._stored: set[str] = set()  # ids that the witness was told are stored
        self._arrivals: defaultdict[bytes, set[int]] = defaultdict(set)
        self._trouble = ""
        self._closing = threading.Event()
        self._witness = threading.Thread(target=self._watch, name="witness", daemon=True)
        self._witness.start()

    def look(self) -> Contents:
        """All that is in the buffer, once it answers; raises GaveUp."""
        deadline = time.monotonic() + _LOOK_S
        while True:
            try:
                with _store_of(self._job) as store:
                    contents = contents_of(store)
            except (OSError, redis.RedisError) as error:
                if time.monotonic() > deadline:
                    raise GaveUp(
                        f"the buffer did not answer for {_LOOK_S:.0f} s: {error}"
                    ) from None
                time.sleep(_BEAT_S)
            else:
                self._note(contents)
                return contents

    def judge(self, before: Contents) -> tuple[int, int]:
        """What is lost since `before`, and what is there twice.

        Raises GaveUp: the buffer does not answer, or takes nothing more of the witness.
        """
        number, deadline = len(self._stored), time.monotonic() + _LOOK_S
        while len(self._stored) == number:
            if time.monotonic() > deadline:
                raise GaveUp(
                    f"the witness could store nothing for {_LOOK_S:.0f} s: {self._trouble}"
                )
            time.sleep(_BEAT_S)
        stored = frozenset(self._stored)
        after = self.look()
        rows = read_metrics(self._job.directory.metrics_file)
        versions = [int(row["policy/version"]) for row in rows]
        return lost(before, after, witnessed=stored), duplicated(dict(self._arrivals), versions)

    def close(self) -> None:
        """Watch no more."""
        self._closing.set()
        self._witness.join()

    def _watch(self) -> None:
        number = 0
        while not self._closing.wait(_BEAT_S):
            try:
                with _store_of(self._job) as store:
                    replay = ReplayBuffer(store, config=BufferConfig())
                    while not self._closing.wait(_BEAT_S):
                        one = evidence(number)
                        replay.seed([one])
                        self._stored.add(one.id)
                        number += 1
                        if number % _LOOK_EVERY == 0:
                            self._note(contents_of(store))
            except Exception as error:  # there is a fault: it is offered again
                self._trouble = repr(error)

    def _note(self, contents: Contents) -> None:
        for number, payload in contents.groups.items():
            self._arrivals[payload].add(number)


def evidence(number: int) -> Trajectory:
    """What the witness stores: of a prompt that no other has, so that no rule takes it out."""
    one, none = np.array([1], np.int32), np.zeros(0, np.int32)
    return Trajectory(
        task="toy",
        prompt_key=f"witness-{number}",
        prompt=one,
        answer=none,
        completion=one,
        from_tool=np.zeros(1, np.bool_),
        stops=one,
        log_reward=np.array([-1.0], np.float32),
        behaviour_log_prob=np.array([-1.0], np.float32),
        behaviour_log_stop=np.array([-1.0], np.float32),
        policy_version=0,
        behaviour="demonstration",
        temperature=1.0,
        actor="witness",
        created_s=time.time(),
        correct=None,
    )


def offered(contents: Contents) -> int:
    """Trajectories that the buffer has acknowledged."""
    return Counters.read(contents.meta).offered


def lost(before: Contents, after: Contents, *, witnessed: Collection[str]) -> int:
    """Trajectories and groups that are unaccounted for.

    Args:
        witnessed: ids that must be there, whatever else has come and gone.
    """
    then, now = Counters.read(before.meta), Counters.read(after.meta)
    forgotten = max(0, then.offered - now.offered)
    forgotten += max(0, then.groups_accepted - now.groups_accepted)
    items = _unexplained(before.payload, after.payload, then, now, TAKEN_OUT)
    groups = _unexplained(before.groups, after.groups, then, now, LEAVING_FRESH)
    missing = len(set(witnessed) - after.payload.keys())
    discrepancies = len(audit_contents(after, BufferConfig()).discrepancies)
    return forgotten + items + groups + missing + discrepancies


def _unexplained(
    before: Collection[Any],
    after: Collection[Any],
    then: Counters,
    now: Counters,
    ways: Sequence[str],
) -> int:
    """How many more are gone than the counters of these ways have grown by."""
    left = sum(getattr(now, way) - getattr(then, way) for way in ways)
    return max(0, len(set(before) - set(after)) - left)


def duplicated(arrivals: Mapping[bytes, Collection[int]], versions: Sequence[int]) -> int:
    """Groups that were taken in again, and versions of the policy that were given again.

    Args:
        arrivals: under which numbers each group was seen.
        versions: of the learner's steps.
    """
    groups = sum(len(numbers) - 1 for numbers in arrivals.values())
    return groups + sum(count - 1 for count in Counter(versions).values())


@contextmanager
def _store_of(job: Job) -> Iterator[RedisStore]:
    url, password = reach(job.directory.buffer, job.buffer)
    with connect(url, password=password, timeout_s=_ANSWER_S) as client:
        yield RedisStore(client, run=RUN)

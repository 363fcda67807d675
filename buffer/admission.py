"""Which newcomers a prompt's replay admits: duplicates, near-duplicates, quota.

Pure: the store commits the decision only if what it was made on is still stored.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from buffer.config import BufferConfig

COUNTED = ("offered", "duplicates", "near_rejected", "near_replaced", "evicted_quota")
# Tokens from which on an edit distance costs more than a bound of it.
_LONG = 512
_BUCKETS = 4096  # at most


class Item(NamedTuple):
    """The part of a trajectory that the rules see, and of a newcomer its packed record."""

    id: str
    completion: NDArray[np.int32]  # [L]
    log_reward: float  # terminal, nats
    payload: bytes = b""


class Put(NamedTuple):
    """A newcomer to write, and what its arrival did."""

    item: Item
    duplicates: int = 0  # newcomers that came under this id when it was stored
    near_replaced: int = 0  # items that made way for it


class Plan(NamedTuple):
    """Changes to one revision of a prompt; each newcomer and each loss is counted exactly once."""

    prompt: str
    revision: int
    put: tuple[Put, ...]
    removed: tuple[str, ...]  # ids stored before that have to go, even if they come again
    counts: Counter[str]  # by the names in COUNTED, as `buffer.stats.Counters` has them
    keep_stored: bool  # where there is no room, what is put goes again, and nothing else


def plan(
    prompt: str,
    revision: int,
    stored: Sequence[Item],
    newcomers: Sequence[Item],
    rules: BufferConfig,
    *,
    keep_stored: bool,
) -> Plan:
    """Admit newcomers in order.

    A newcomer meets ALL items of its prompt, so that no two stored items are ever near-duplicates:
    it is rejected if one near it has at least its log-reward, else it replaces all those near it.
    Ties of the quota go by id. With `keep_stored` nothing that is stored gives way, and who is
    stored already is no newcomer.
    """
    fixed = {item.id for item in stored} if keep_stored else set()
    newcomers = [newcomer for newcomer in newcomers if newcomer.id not in fixed]
    completions = [item.completion for item in (*stored, *newcomers)]
    near = near_duplicates(
        completions[len(stored) :], completions, tolerance=rules.near_duplicate_tolerance
    )
    kept = {item.id: (item.log_reward, column) for column, item in enumerate(stored)}
    put: dict[str, Put] = {}
    removed: list[str] = []
    counts = Counter(offered=len(newcomers))

    def remove(id: str) -> None:
        if kept.pop(id)[1] < len(stored):
            removed.append(id)
        put.pop(id, None)

    for row, newcomer in enumerate(newcomers):
        if newcomer.id in kept:
            counts["duplicates"] += 1
            kept[newcomer.id] = (newcomer.log_reward, kept[newcomer.id][1])
            so_far = put.get(newcomer.id, Put(newcomer))
            put[newcomer.id] = so_far._replace(item=newcomer, duplicates=so_far.duplicates + 1)
            continue
        rivals = [id for id, (_, column) in kept.items() if near[row, column]]
        if any(id in fixed or kept[id][0] >= newcomer.log_reward for id in rivals):
            counts["near_rejected"] += 1
            continue
        for id in rivals:
            remove(id)
        counts["near_replaced"] += len(rivals)
        kept[newcomer.id] = (newcomer.log_reward, len(stored) + row)
        put[newcomer.id] = Put(newcomer, near_replaced=len(rivals))
        while len(kept) > rules.quota_per_prompt:
            remove(min(kept.keys() - fixed, key=lambda id: (kept[id][0], id)))
            counts["evicted_quota"] += 1
    return Plan(prompt, revision, tuple(put.values()), tuple(removed), counts, keep_stored)


def advantages(log_reward: Mapping[str, float]) -> dict[str, float]:
    """Rank of each item of one prompt against eviction for want of room, by id; lowest goes first.

    It is the log-reward less that of the prompt's best, so that prompts compare whose rewards are
    of another height; infinite for that best item itself.
    """
    best = max(log_reward, key=lambda id: (log_reward[id], id), default="")
    return {
        id: math.inf if id == best else value - log_reward[best] for id, value in log_reward.items()
    }


def lengths_near(lengths: Sequence[int], *, tolerance: float) -> tuple[int, int]:
    """From and to which length a completion can be near one of these; crossed where none can."""
    if tolerance == 0:
        return 1, 0
    ratio = (1 - tolerance) / (1 + tolerance)
    return math.floor(ratio * min(lengths)), math.ceil(max(lengths) / ratio)


def near_duplicates(
    rows: Sequence[NDArray[np.int32]], columns: Sequence[NDArray[np.int32]], *, tolerance: float
) -> NDArray[np.bool_]:
    """Which pairs have a token edit distance below tolerance * (sum of their lengths).

    The rule of Hu et al. 2024 (their released buffer, tolerance 0.25), [N, M] for N and M
    completions of token ids below 2**20. With tolerance 0 no pair is near, not even equal ones.
    """
    near_NM = np.zeros((len(rows), len(columns)), np.bool_)
    if not rows or not columns or tolerance == 0:
        return near_NM
    row_N, column_M = (np.array([each.size for each in side]) for side in (rows, columns))
    limit_NM = tolerance * np.add.outer(row_N, column_M)
    apart_NM = np.abs(np.subtract.outer(row_N, column_M))
    if max(row_N.max(), column_M.max()) >= _LONG:
        apart_NM = (apart_NM + _bag_differences(rows, columns)) / 2
    texts = [as_text(column) for column in columns]
    for row, limit_M, apart_M, near_M in zip(rows, limit_NM, apart_NM, near_NM, strict=True):
        open_K = np.flatnonzero(apart_M < limit_M)
        (distance_K,) = cdist(
            [as_text(row)],
            [texts[column] for column in open_K],
            scorer=Levenshtein.distance,
            # Beyond the loosest limit the exact distance is of no use and costs time.
            score_cutoff=int(np.ceil(limit_M.max())),
            dtype=np.int32,
        )
        near_M[open_K] = distance_K < limit_M[open_K]
    return near_NM


def _bag_differences(
    rows: Sequence[NDArray[np.int32]], columns: Sequence[NDArray[np.int32]]
) -> NDArray[np.int64]:
    """[N, M] tokens, in any order, that one completion of a pair has and the other lacks, or fewer.

    An edit changes it by 2, or by 1 if it changes the length by 1: so half its sum with the
    difference of lengths bounds the edit distance from below (Bartolini et al. 2002). Over a small
    vocabulary long completions hold about the same tokens: the bound, though true, excludes next to
    nothing there, and the exact distances of all are taken.
    """
    # Tokens that share a bucket can only hide a difference.
    buckets = min(_BUCKETS, 1 + max(int(each.max(initial=0)) for each in (*rows, *columns)))
    row_NB, column_MB = (
        np.stack([np.bincount(each % buckets, minlength=buckets) for each in side]).astype("i4")
        for side in (rows, columns)
    )
    return np.stack([np.abs(column_MB - row_B).sum(axis=1) for row_B in row_NB])


def as_text(tokens: NDArray[np.int32]) -> str:
    """Tokens as code points, the form that rapidfuzz compares without hashing each token."""
    return tokens.astype("<i4", copy=False).tobytes().decode("utf-32-le", "surrogatepass")

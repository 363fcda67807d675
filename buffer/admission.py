"""What a group changes in the replay of its prompt: duplicates, near-duplicates, quota.

Pure: it decides from what is stored, and the store commits the decision only if nothing has
changed since it was read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from buffer.near_duplicate import near_duplicates


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """What the rules see of a trajectory."""

    id: str
    completion: NDArray[np.int32]  # [L]
    log_reward: float  # terminal, nats


@dataclass(frozen=True, slots=True)
class Put:
    """One item to write, and what its arrival did."""

    row: int  # the newcomer whose payload is written, by position
    duplicates: int = 0  # newcomers that came under this id when it was stored
    near_replaced: int = 0  # items that made way for it


@dataclass(frozen=True, slots=True)
class Plan:
    """Changes to one prompt; every newcomer and every loss is counted exactly once."""

    put: tuple[Put, ...]
    removed: tuple[str, ...]  # ids stored before that have to go, even if they come again
    duplicates: int  # newcomers whose id was stored: their payload replaces it
    near_rejected: int  # newcomers with a near-duplicate at least as good
    near_replaced: int  # items that made way for a better near-duplicate
    evicted_quota: int  # items with the lowest log-reward beyond the quota


def plan(
    stored: Sequence[Item], newcomers: Sequence[Item], *, tolerance: float, quota: int
) -> Plan:
    """Admit newcomers in order.

    A newcomer meets ALL items of its prompt, so that no two stored items are ever near-duplicates:
    it is rejected if one near it has at least its log-reward, else it replaces all those near it.
    Ties of the quota go by id.
    """
    items = [*stored, *newcomers]
    near = near_duplicates(
        [item.completion for item in newcomers],
        [item.completion for item in items],
        tolerance=tolerance,
    )
    kept = {item.id: (item.log_reward, column) for column, item in enumerate(stored)}
    put: dict[str, Put] = {}
    removed: list[str] = []

    def remove(id: str) -> None:
        if kept.pop(id)[1] < len(stored):
            removed.append(id)
        put.pop(id, None)

    duplicates = near_rejected = near_replaced = evicted_quota = 0
    for row, newcomer in enumerate(newcomers):
        if newcomer.id in kept:
            duplicates += 1
            kept[newcomer.id] = (newcomer.log_reward, kept[newcomer.id][1])
            so_far = put.get(newcomer.id, Put(row))
            put[newcomer.id] = replace(so_far, row=row, duplicates=so_far.duplicates + 1)
            continue
        rivals = [id for id, (_, column) in kept.items() if near[row, column]]
        if any(kept[id][0] >= newcomer.log_reward for id in rivals):
            near_rejected += 1
            continue
        for id in rivals:
            remove(id)
        near_replaced += len(rivals)
        kept[newcomer.id] = (newcomer.log_reward, len(stored) + row)
        put[newcomer.id] = Put(row, near_replaced=len(rivals))
        while len(kept) > quota:
            remove(min(kept, key=lambda id: (kept[id][0], id)))
            evicted_quota += 1
    return Plan(
        put=tuple(put.values()),
        removed=tuple(removed),
        duplicates=duplicates,
        near_rejected=near_rejected,
        near_replaced=near_replaced,
        evicted_quota=evicted_quota,
    )

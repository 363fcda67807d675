"""What rank 0 hands to the other ranks: bytes, never pickles."""

import json
from collections.abc import Callable, Sequence

from buffer.replay import Group
from buffer.trajectory import pack, unpack
from learner.engine import Engine

_DONE, _FAILED, _UNRECOVERABLE = b"\x00", b"\x01", b"\x02"


class Unrecoverable(RuntimeError):
    """What a learner that starts again would only meet again: the run has to end."""


class RankZeroFailed(RuntimeError):
    """Rank 0 could not produce what this rank was waiting for."""


def share(engine: Engine, produce: Callable[[], bytes]) -> bytes:
    """Run `produce` on rank 0 and give its bytes to all ranks.

    If it raises, so does every rank: rank 0 the error itself, the others RankZeroFailed (or
    Unrecoverable, if it is) at once instead of a timeout later.
    """
    if engine.rank != 0:
        data = engine.broadcast(b"")
        if data[:1] == _FAILED:
            raise RankZeroFailed(f"learner rank 0: {data[1:].decode(errors='replace')}")
        if data[:1] == _UNRECOVERABLE:
            raise Unrecoverable(f"learner rank 0: {data[1:].decode(errors='replace')}")
        return data[1:]
    try:
        data = produce()
    except Exception as error:
        kind = _UNRECOVERABLE if isinstance(error, Unrecoverable) else _FAILED
        engine.broadcast(kind + repr(error).encode())
        raise
    engine.broadcast(_DONE + data)
    return data


def encode_groups(groups: Sequence[Group]) -> bytes:
    """A JSON header of keys and sizes, then the packed trajectories one after the other."""
    header = []
    blobs: list[bytes] = []
    for group in groups:
        fresh = [pack(trajectory) for trajectory in group.fresh]
        replayed = [pack(trajectory) for trajectory in group.replayed]
        header.append([group.prompt_key, [len(b) for b in fresh], [len(b) for b in replayed]])
        blobs += fresh + replayed
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(blobs)


def decode_groups(data: bytes) -> list[Group]:
    """Inverse of encode_groups."""
    start = 8 + int.from_bytes(data[:8], "little")
    groups = []
    for key, *sizes in json.loads(data[8:start]):
        parts = []
        for part in sizes:
            trajectories = []
            for size in part:
                trajectories.append(unpack(data[start : start + size]))
                start += size
            parts.append(tuple(trajectories))
        groups.append(Group(prompt_key=key, fresh=parts[0], replayed=parts[1]))
    return groups

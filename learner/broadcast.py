"""What rank 0 hands to the other ranks: bytes, never pickles."""

from collections.abc import Callable, Sequence

import msgpack

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
        if data[:1] == _DONE:
            return data[1:]
        kind = Unrecoverable if data[:1] == _UNRECOVERABLE else RankZeroFailed
        raise kind(f"learner rank 0: {data[1:].decode(errors='replace')}")
    try:
        data = produce()
    except Exception as error:
        mark = _UNRECOVERABLE if isinstance(error, Unrecoverable) else _FAILED
        engine.broadcast(mark + repr(error).encode())
        raise
    engine.broadcast(_DONE + data)
    return data


def encode_groups(groups: Sequence[Group]) -> bytes:
    """Keys and packed trajectories, as msgpack."""
    data: bytes = msgpack.packb(
        [(g.prompt_key, [*map(pack, g.fresh)], [*map(pack, g.replayed)]) for g in groups]
    )
    return data


def decode_groups(data: bytes) -> list[Group]:
    """Inverse of encode_groups."""
    return [
        Group(prompt_key=key, fresh=(*map(unpack, fresh),), replayed=(*map(unpack, replayed),))
        for key, fresh, replayed in msgpack.unpackb(data)
    ]

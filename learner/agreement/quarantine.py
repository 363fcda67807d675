"""Where trajectories go that the learner does not believe: into files, for people to look at.

quarantine/0001.records     each learner process begins a file of its own, and a new one when full

A file is a sequence of msgpack arrays.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from buffer.trajectory import pack, unpack
from learner.agreement.comparison import Comparison

_PATTERN = "[0-9][0-9][0-9][0-9]*.records"


class Quarantine:
    """Keeps what it is given, in files of bounded size; of too many the oldest goes.

    The first stays: what went wrong at the beginning says most.
    """

    def __init__(
        self, folder: Path, *, max_file_bytes: int = 64 << 20, max_files: int = 16
    ) -> None:
        self._folder = folder
        self._max_file_bytes = max_file_bytes
        self._max_files = max_files
        self._path: Path | None = None
        self._size = 0

    def keep(self, comparisons: Sequence[Comparison]) -> Path:
        """Append; when this returns they survive a loss of power. The file they are in."""
        data = b"".join(map(_encode, comparisons))
        if self._path is None or self._size + len(data) > self._max_file_bytes:
            self._path, self._size = self._next_path(), 0
        with self._path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(data)
        return self._path

    def _next_path(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = sorted(self._folder.glob(_PATTERN))
        for path in kept[1 : max(len(kept) - self._max_files + 2, 1)]:
            path.unlink()
        last = int(kept[-1].stem) if kept else 0
        return self._folder / f"{last + 1:04d}.records"


def read_quarantine(folder: Path) -> Iterator[Comparison]:
    """Everything kept in a folder, oldest first.

    What a crash cut off at the end of a file is passed over. Raises MalformedTrajectory for a
    record whose trajectory is none.
    """
    for path in sorted(folder.glob(_PATTERN)):
        with path.open("rb") as file:
            yield from map(_decode, msgpack.Unpacker(file))


def _encode(comparison: Comparison) -> bytes:
    record: bytes = msgpack.packb(
        (
            pack(comparison.trajectory),
            comparison.learner_version,
            comparison.rms_nats,
            comparison.mean_nats,
            comparison.log_q_token.astype("<f4").tobytes(),
            comparison.log_q_stop.astype("<f4").tobytes(),
        )
    )
    return record


def _decode(record: Sequence[Any]) -> Comparison:
    trajectory, learner_version, rms_nats, mean_nats, log_q_token, log_q_stop = record
    return Comparison(
        trajectory=unpack(trajectory),
        learner_version=learner_version,
        rms_nats=rms_nats,
        mean_nats=mean_nats,
        log_q_token=np.frombuffer(log_q_token, "<f4"),
        log_q_stop=np.frombuffer(log_q_stop, "<f4"),
    )

"""Checkpoints: a folder per version, written whole or not at all, read without pickle.

step-00000040/state.safetensors    parameters, optimizer moments, torch's random state
step-00000040/meta.json            version, identity, other random states, checksums
step-00000040/companion            what else of the run belongs to this moment, where it was saved
published                          highest version that actors may have seen
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from lm.adapter import checksum

FORMAT = 1
PUBLISHED_FILE = "published"
STATE_FILE = "state.safetensors"
META_FILE = "meta.json"
COMPANION_FILE = "companion"


class CheckpointDamaged(ValueError):
    """A checkpoint's files are not what was written."""


class CheckpointMismatch(ValueError):
    """A checkpoint belongs to another base model or configuration."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything a learner needs to go on as if it had never stopped."""

    version: int  # of the weights
    tensors: dict[str, Tensor]
    facts: dict[str, Any]  # JSON values

    @staticmethod
    def decode(data: bytes) -> "Snapshot":
        """Inverse of Checkpoints.read."""
        start = 8 + int.from_bytes(data[:8], "little")
        meta = json.loads(data[8:start])
        return Snapshot(meta["version"], load(data[start:]), meta["facts"])


class Checkpoints:
    """The checkpoints of one run, newest last. One process writes; a crash loses at most one.

    Args:
        folder: holds one folder per checkpoint; created when the first is saved.
        identity: what a later run must share to restore from here: name -> value.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, *, identity: Mapping[str, str], keep: int) -> None:
        self._folder = folder
        self._identity = dict(identity)
        self._keep = keep

    def save(self, snapshot: Snapshot, companion: bytes | None = None) -> Path:
        """Write a snapshot, and what `read_companion` is to give: both survive a loss of power."""
        state = save({name: t.contiguous() for name, t in snapshot.tensors.items()})
        meta = {
            "format": FORMAT,
            "version": snapshot.version,
            "identity": self._identity,
            "checksum": checksum(state),
            "companion": None if companion is None else checksum(companion),
            "facts": snapshot.facts,
        }
        final = self._folder / f"step-{snapshot.version:08d}"
        partial = self._folder / f".partial-{os.getpid()}"
        for abandoned in self._folder.glob(".partial-*"):
            shutil.rmtree(abandoned)
        partial.mkdir(parents=True)
        files = {STATE_FILE: state, META_FILE: json.dumps(meta, indent=1).encode()}
        if companion is not None:
            files[COMPANION_FILE] = companion
        for name, data in files.items():
            (partial / name).write_bytes(data)
            _sync(partial / name)
        _sync(partial)
        if final.exists():
            shutil.rmtree(final)  # of a run that went back to before it
        os.rename(partial, final)
        _sync(self._folder)
        for old in self._all()[: -self._keep]:
            shutil.rmtree(old)
        return final

    def note_published(self, version: int) -> None:
        """Remember, before anybody sees it, that `version` is used up.

        After a loss of power, though not of this process, the last few may be forgotten.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f".{PUBLISHED_FILE}-{os.getpid()}"
        try:
            partial.write_text(f"{version}\n")
            os.replace(partial, self._folder / PUBLISHED_FILE)
        except OSError as error:  # of a full disk it names no file by itself
            raise OSError(error.errno, error.strerror, str(partial)) from error

    def last_published(self) -> int:
        """The highest version noted, -1 before the first."""
        try:
            return int((self._folder / PUBLISHED_FILE).read_text())
        except FileNotFoundError:
            return -1

    def latest(self) -> Path | None:
        """The newest checkpoint, None before the first."""
        return max(self._all(), default=None)

    def read(self) -> bytes:
        """The newest checkpoint, verified, in one piece that Snapshot.decode understands.

        Raises:
            FileNotFoundError: there is none.
            CheckpointDamaged: a file is missing, cut or changed.
            CheckpointMismatch: it was written under another identity.
        """
        path = self.latest()
        if path is None:
            raise FileNotFoundError(f"no checkpoint in {self._folder}: start without resuming")
        try:
            meta, state = (path / META_FILE).read_bytes(), (path / STATE_FILE).read_bytes()
            fields = json.loads(meta)
            saved_format, expected = fields["format"], fields["checksum"]
            identity = dict(fields["identity"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, f"is unreadable: {error}") from error
        if saved_format != FORMAT:
            raise CheckpointMismatch(
                f"checkpoint {path} has format {saved_format}, this program reads {FORMAT}"
            )
        if expected != checksum(state):
            raise _damaged(path, f"is damaged: {STATE_FILE} was altered")
        for name in sorted(self._identity | identity):
            if identity.get(name) != self._identity.get(name):
                raise CheckpointMismatch(
                    f"checkpoint {path} was written with {name} = {identity.get(name)}, this run "
                    f"has {self._identity.get(name)}; use the settings of that run, or another "
                    "folder"
                )
        return len(meta).to_bytes(8, "little") + meta + state

    def read_companion(self) -> bytes | None:
        """What was saved with the newest checkpoint; None if nothing was.

        Raises CheckpointDamaged.
        """
        path = self.latest()
        expected = path and json.loads((path / META_FILE).read_bytes()).get("companion")
        if path is None or expected is None:
            return None
        companion = path / COMPANION_FILE
        data = companion.read_bytes() if companion.exists() else b""
        if checksum(data) != expected:
            raise _damaged(path, f"is damaged: {COMPANION_FILE} was altered")
        return data

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"))


def _damaged(path: Path, how: str) -> CheckpointDamaged:
    return CheckpointDamaged(
        f"checkpoint {path} {how}; remove {path} to resume from the checkpoint before it"
    )


def _sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""A copy in a bucket of what of a run must outlive its cluster.

The run's folder stays the place of the run. A thread of the driver copies, after each checkpoint
and at the end, what a later cluster needs to go on and what people want of it; the buffer, logs
and older checkpoints are left out. `index.json`, written last, names the files of one whole copy:
one that was cut off is as if it had not begun.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import fsspec

from cluster.config.project import UserError
from cluster.run.directory import BUCKET_VARIABLE, RunDirectory
from cluster.run.display import first_line

INDEX = "index.json"
DEADLINE_S = 600.0  # of the last copy
_LOOK_S = 2.0
# Neither the state nor the claim: they are of the driver that has gone.
_FILES = (
    *("config.toml", "identity.json", "scores.json", "metrics.jsonl", "report.html"),
    "checkpoints/published",
)
_FOLDERS = ("adapter", "model", "plots", "quarantine")  # beside the newest checkpoint
_OBSTORE = ("s3", "gs", "az")  # what obstore opens; fsspec's own drivers pin what Ray needs

Stamp = tuple[int, int]  # size and time of the last change


class MirrorFailed(UserError):
    """The bucket does not have all of a run."""


class Bucket:
    """The place of one run in a bucket: any that fsspec or obstore knows, by URL."""

    def __init__(self, url: str, run: str) -> None:
        self.url = f"{url.rstrip('/')}/{run}"
        protocol = url.partition("://")[0]
        try:
            if protocol in _OBSTORE:
                import_module("obstore.fsspec").register(protocol)
            self._files, self._root = fsspec.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{BUCKET_VARIABLE} = {url!r} cannot be opened: {first_line(error)}: give a URL "
                "such as s3://bucket/folder; s3, gs and az need 'pip install obstore'"
            ) from error

    def index(self) -> list[str]:
        """Names of the files of the last whole copy; none before the first."""
        try:
            return list(json.loads(self._files.cat_file(self._path(INDEX))))
        except FileNotFoundError:
            return []

    def runs(self) -> list[str]:
        """Names of the runs in the bucket."""
        folder = self._root.rpartition("/")[0]
        try:
            paths = self._files.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        return [str(path).rstrip("/").rpartition("/")[2] for path in paths]

    def write_index(self, names: list[str]) -> None:
        self._files.pipe_file(self._path(INDEX), json.dumps(names, indent=1).encode())

    def put(self, source: Path, name: str) -> None:
        self._files.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
        self._files.put_file(str(source), self._path(name))

    def get(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self._files.get_file(self._path(name), str(target))

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class Mirror:
    """Copies a run's folder to its bucket, in a thread that nobody waits for but `close`."""

    def __init__(self, directory: RunDirectory, bucket: Any, report: Callable[[str], None]) -> None:
        self._directory = directory
        self._bucket = bucket
        self._report = report
        self._copied: dict[str, Stamp | None] = {}
        self._newest: Path | None = None  # checkpoint of the last copy
        self._failure = "it was not begun"  # of the last copy; empty where there is none
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = DEADLINE_S) -> None:
        """Copy what is there now; raises MirrorFailed where that does not end well in time."""
        self._stopping.set()
        self._thread.join(timeout_s)
        late = f"not done after {timeout_s:.0f} s" if self._thread.is_alive() else ""
        if why := late or self._failure:
            raise MirrorFailed(
                f"{self._bucket.url} ({BUCKET_VARIABLE}) does not have all of run "
                f"{self._directory.name!r} ({why}): it is whole in {self._directory.path}; copy "
                "what you need from there, or --resume the run when the bucket answers"
            )

    def _run(self) -> None:
        failing = False
        while not self._stopping.wait(_LOOK_S):
            checkpoints = self._directory.checkpoints.glob("step-*")
            newest = max(checkpoints, default=None)
            if newest is None or (newest == self._newest and not self._failure):
                continue
            self._try_to_copy()
            self._newest = newest
            if self._failure and not failing:
                self._report(
                    f"could not copy the run to {self._bucket.url}: {self._failure}; it goes on, "
                    "and tries again"
                )
            failing = bool(self._failure)
        self._try_to_copy()

    def _try_to_copy(self) -> None:
        try:
            self._copy()
            self._failure = ""
        except Exception as error:  # of many classes, from the network
            self._failure = f"{type(error).__name__}: {first_line(error)}"

    def _copy(self) -> None:
        """Copy what is new or changed, say so in the index, and remove what is gone."""
        if not self._copied:
            self._copied = dict.fromkeys(self._bucket.index())
        found = dict(_stamped(self._directory.path))
        new = [name for name, stamp in found.items() if self._copied.get(name) != stamp]
        with _held(self._directory.path, new) as held:
            for name in new:
                self._bucket.put(held / name, name)
                self._copied[name] = found[name]
        self._bucket.write_index(list(found))
        for name in self._copied.keys() - found.keys():
            self._bucket.remove(name)
            del self._copied[name]


def _stamped(folder: Path) -> Iterator[tuple[str, Stamp]]:
    """Names and stamps of the files to copy; none that is still being written."""
    newest = sorted(folder.glob("checkpoints/step-*"))[-1:]
    folders = (*newest, *(folder / name for name in _FOLDERS))
    inner = (path for each in folders for path in each.rglob("*"))
    for path in (*(folder / name for name in _FILES), *sorted(inner)):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            status = path.stat()
            yield name.as_posix(), (status.st_size, status.st_mtime_ns)


@contextmanager
def _held(folder: Path, names: list[str]) -> Iterator[Path]:
    """A folder that holds these files, however soon the run removes or replaces its own."""
    held = folder / ".mirror"
    shutil.rmtree(held, ignore_errors=True)  # of a driver that was killed
    try:
        for name in names:
            (held / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(folder / name, held / name)
            except OSError:  # of a file system without links
                shutil.copyfile(folder / name, held / name)
        yield held
    finally:
        shutil.rmtree(held, ignore_errors=True)


@contextmanager
def mirrored(directory: RunDirectory, report: Callable[[str], None]) -> Iterator[None]:
    """Keep a copy of the run where the environment names a bucket; else nothing."""
    if not (url := os.environ.get(BUCKET_VARIABLE)):
        yield
        return
    mirror = Mirror(directory, Bucket(url, directory.name), report)
    try:
        yield
    except BaseException:
        try:
            mirror.close()
        except MirrorFailed as error:
            report(str(error))  # what ended the run is worth more
        raise
    mirror.close()


def fetch(directory: RunDirectory) -> None:
    """Get a run that is not here from the bucket, if one is named and has it."""
    url = os.environ.get(BUCKET_VARIABLE)
    if not url or directory.path.exists():
        return
    bucket, partial = Bucket(url, directory.name), directory.path.with_name(f".{directory.name}")
    with _reading(bucket, directory):
        for name in (names := bucket.index()):
            bucket.get(name, partial / name)
    if names:
        os.replace(partial, directory.path)


def begun_elsewhere(directory: RunDirectory, endings: str) -> bool:
    """Whether an experiment that is not here has runs in the bucket.

    Args:
        endings: regular expression of what their names have behind the experiment's, and a hyphen.
    """
    if not (url := os.environ.get(BUCKET_VARIABLE)) or directory.path.exists():
        return False
    with _reading(bucket := Bucket(url, directory.name), directory):
        own = re.compile(f"{re.escape(directory.name)}-(?:{endings})")
        return any(own.fullmatch(name) for name in bucket.runs())


def must_fetch(directory: RunDirectory, *, resume: bool) -> bool:
    """A run that goes on is in the bucket and not here.

    Raises UserError where this driver would overwrite what the bucket alone has: a run of the name
    of a new one, or a newer checkpoint than is here.
    """
    if not (url := os.environ.get(BUCKET_VARIABLE)):
        return False
    bucket = Bucket(url, directory.name)
    with _reading(bucket, directory):
        names = bucket.index()
    if names and not resume:
        raise UserError(
            f"{bucket.url} ({BUCKET_VARIABLE}) has a run {directory.name!r}: add --resume to go on "
            "with it, or choose another --run"
        )
    steps = (name.split("/")[1] for name in names if name.startswith("checkpoints/step-"))
    there = max(steps, default="")
    here = max((path.name for path in directory.checkpoints.glob("step-*")), default="")
    if directory.path.exists() and there > here:
        raise UserError(
            f"{bucket.url} ({BUCKET_VARIABLE}) has {there}, and {directory.path} has "
            f"{here or 'no checkpoint'}: move the folder away, and --resume fetches the newer, or "
            f"unset {BUCKET_VARIABLE} to go on from the older"
        )
    return bool(names) and not directory.path.exists()


@contextmanager
def _reading(bucket: Bucket, directory: RunDirectory) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of many classes, from the network
        raise UserError(
            f"run {directory.name!r} could not be looked up in {bucket.url} ({BUCKET_VARIABLE}): "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error

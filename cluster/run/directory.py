"""The folder of a run: its files, the claim of its driver, its state, and requests to scale it."""

import difflib
import fcntl
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Literal, get_args

import psutil
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from cluster.config.project import UserError
from tasks.evaluation.evaluation import Scores
from tasks.records import mistake

# On a cluster: a folder outside of the job's copy of the code, which every node sees.
RUNS = Path(os.environ.get("AMORTIZE_RUNS", "runs")).expanduser()
# Names the place, outside of the cluster, that runs are copied to: cluster/run/mirror.py.
BUCKET_VARIABLE = "AMORTIZE_BUCKET"
RAY_PACKAGE = "_ray_pkg_"  # begins the name of a job's copy of the code
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# The kernel gives start times in clock ticks; rounding must not look like another process.
_START_TOLERANCE_S = 1.0

# Out of time: ended by cluster.time_limit_s, with steps left.
EndPhase = Literal["stopped", "out of time", "done", "failed"]
RunPhase = Literal["starting", "evaluating", "training", "stopping"] | EndPhase
# Refused: nothing was changed. Given up: an added part did not come up, the run does without.
ScaleOutcome = Literal["refused", "under way", "done", "given up"]
ENDED: tuple[RunPhase, ...] = get_args(EndPhase)


class ScaleRequest(BaseModel):
    """Numbers that a run shall have from now on; None leaves one as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(default_factory=lambda: uuid.uuid4().hex, min_length=1)
    actors: PositiveInt | None = None
    replicas: PositiveInt | None = None

    @property
    def numbers(self) -> dict[str, int]:
        """What is asked for, under the names that `RunState.desired` uses."""
        return self.model_dump(exclude={"id"}, exclude_none=True)


class ScaleAnswer(BaseModel):
    """What the driver says to the last request to scale."""

    model_config = ConfigDict(frozen=True)

    id: str  # of the request
    outcome: ScaleOutcome
    error: str = ""  # why it was refused, or what was given up


class RunState(BaseModel):
    """What `state.json` says; the driver writes it, anybody reads it. Times in Unix seconds."""

    model_config = ConfigDict(frozen=True)

    run: str
    pid: int  # of the driver, on `host`
    pid_started_s: float  # tells a reused pid apart
    host: str
    started_s: float  # when this driver began
    heartbeat_s: float  # of this state
    phase: RunPhase
    step: int = 0
    steps: int = 0
    version: int = 0
    address: str = ""  # of the Ray cluster; empty without Ray
    desired: dict[str, int] = {}  # parts by kind
    actual: dict[str, int] = {}
    scale: ScaleAnswer | None = None  # to the last request to scale
    metrics: dict[str, float] = {}  # last value of each
    message: str = ""  # why it failed, or the last event
    killed: tuple[str, ...] = ()  # parts that did not stop by themselves

    @property
    def ended(self) -> bool:
        """Whether the driver ended the run, rather than died."""
        return self.phase in ENDED

    @property
    def goes_on(self) -> bool:
        """Whether the driver lives on this machine, and has not ended the run."""
        return not self.ended and self.driver() is not None

    def driver(self) -> psutil.Process | None:
        """The driver's process, if it lives on this machine."""
        if self.host != socket.gethostname():
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.pid_started_s) <= _START_TOLERANCE_S
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def first_state(run: str, *, steps: int) -> RunState:
    """The state of a run that this process begins to drive."""
    return RunState(
        run=run,
        pid=os.getpid(),
        pid_started_s=psutil.Process().create_time(),
        host=socket.gethostname(),
        started_s=time.time(),
        heartbeat_s=time.time(),
        phase="starting",
        steps=steps,
    )


class RunDirectory:
    """Paths of one run, below `root`/`name`; raises UserError for a name that is no folder's."""

    def __init__(self, name: str, *, root: Path = RUNS) -> None:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"run name {name!r}: use up to 100 letters, digits, '.', '-' and '_', "
                f"beginning with a letter or digit"
            )
        self.name = name
        self.path = (root / name).absolute()
        self.config_file = self.path / "config.toml"
        self.identity_file = self.path / "identity.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.state_file = self.path / "state.json"
        self.scores_file = self.path / "scores.json"
        self.report_file = self.path / "report.html"
        self.stop_request = self.path / "stop-request"
        self.scale_request = self.path / "scale-request"
        self.adapter = self.path / "adapter"
        self.model = merged_folder(self.adapter)  # of an M-step alone
        self.buffer = self.path / "buffer"
        self.checkpoints = self.path / "checkpoints"
        self.quarantine = self.path / "quarantine"
        self.plots = self.path / "plots"
        self._lock: int | None = None

    def begin(self, *, resume: bool) -> None:
        """Make this process the driver of a new run, or of an old one that goes on.

        The claim ends with the process, however it ends. Raises UserError.
        """
        self.check(resume=resume)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / "driver.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.end()
            raise self._driven_elsewhere() from None
        self.stop_request.unlink(missing_ok=True)
        self.scale_request.unlink(missing_ok=True)

    def check(self, *, resume: bool) -> None:
        """Raise UserError where `begin` would, but for a race; changes nothing."""
        if any(part.startswith(RAY_PACKAGE) for part in self.path.parts):
            raise UserError(
                f"{self.path} would go with this job's copy of the code: set AMORTIZE_RUNS, where "
                f"Ray is started on the head or in the job's runtime environment, to a folder that "
                f"every node sees"
            )
        state = self.state()
        if state is not None and state.goes_on:
            raise self._driven_elsewhere()
        if resume and not self.config_file.exists():
            raise UserError(
                f"there is no run {self.name!r} in {self.path.parent} to resume; "
                f"it has: {_listing(self.path.parent)}"
            )
        if not resume and self.path.exists():
            raise UserError(
                f"{self.path} exists: add --resume to go on with it, or choose another --run"
            )

    def end(self) -> None:
        """Give up the claim of `begin`."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write_state(self, state: RunState) -> None:
        write_whole(self.state_file, state.model_dump_json(indent=2))

    def state(self) -> RunState | None:
        """What the driver last wrote; None before it wrote anything readable."""
        try:
            return self.known_state()
        except UserError:
            return None

    def known_state(self) -> RunState:
        """What the driver last wrote; raises UserError where that cannot be read, and says why."""
        try:
            return RunState.model_validate_json(self.state_file.read_bytes())
        except OSError as error:
            why = str(error.strerror)
        except ValidationError as error:
            first = error.errors()[0]
            why = f"{next(iter(first['loc']), 'the file')}: {mistake(first)}"
        raise UserError(
            f"run {self.name!r}: its driver's {self.state_file} cannot be read ({why}), so that "
            "nobody knows whether it goes on"
        )

    def _driven_elsewhere(self) -> UserError:
        state = self.state()
        who = "another process" if state is None else f"process {state.pid} on {state.host}"
        return UserError(
            f"run {self.name!r} is driven by {who}: stop it with 'amortize stop --run {self.name}'"
        )


def post_scale_request(directory: RunDirectory, request: ScaleRequest) -> None:
    """Lay a request before the run's driver; an earlier one that it has not taken is replaced."""
    write_whole(directory.scale_request, request.model_dump_json())


def take_scale_request(directory: RunDirectory) -> ScaleRequest | None:
    """Take the request that lies there, if any; nobody else will get it.

    Raises UserError where it cannot be read; it is gone all the same.
    """
    taken = directory.scale_request.with_name(".scale-request.taken")
    try:
        os.replace(directory.scale_request, taken)
    except FileNotFoundError:
        return None
    text = taken.read_bytes()
    taken.unlink()
    try:
        return ScaleRequest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{directory.scale_request} held no request to scale ({where}: {mistake(first)}); "
            f"use 'amortize scale'"
        ) from None


def merged_folder(adapter: Path) -> Path:
    """Where an M-step leaves its language model: beside its adapter, which is folded into it."""
    return adapter.with_name("model")


def read_scores(
    directory: RunDirectory, warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr)
) -> Scores:
    """What earlier sittings of the run have measured; `warn` is told of a file that is no such."""
    if not directory.scores_file.exists():
        return Scores()
    try:
        return Scores.model_validate_json(directory.scores_file.read_bytes())
    except ValidationError:
        warn(
            f"{directory.scores_file} is of another version of amortize and counts for nothing: "
            "what it held is measured again"
        )
        return Scores()


def check_shared(path: Path, *, node: str) -> None:
    """Raise UserError unless this `node` sees `path`, the folder of a run that has begun."""
    if not (path / "config.toml").is_file():
        raise UserError(
            f"node {node} does not see {path}, where the run's checkpoints and adapter belong: "
            f"mount one folder on every node, and name it in AMORTIZE_RUNS"
        )


def check_seen(key: str, folder: str | None, *, node: str) -> None:
    """Raise UserError unless this `node` sees the adapter that the setting `key` names, if any."""
    if folder is not None and not (Path(folder) / "adapter_config.json").is_file():
        raise UserError(
            f"node {node} sees no adapter in {key} = {folder!r}, which it has to read: keep it "
            "in a folder that every node mounts, such as that of the runs (AMORTIZE_RUNS)"
        )


def write_whole(path: Path, text: str) -> None:
    """Write a file so that no reader and no crash ever sees half of it; an OSError names it."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def new_name(task: str, *, root: Path = RUNS) -> str:
    """A free name such as arithmetic-20260101-120000."""
    stem = f"{task}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (stem, *(f"{stem}-{number}" for number in range(2, 1000)))
    return next(name for name in names if not (root / name).exists())


def find_run(name: str, *, root: Path = RUNS) -> RunDirectory:
    """An existing run; raises UserError, listing those that exist."""
    run = RunDirectory(name, root=root)
    if not run.path.is_dir():
        near = difflib.get_close_matches(name, [path.name for path in _folders(root)], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"no run {name!r} in {root.absolute()}; {hint}it has: {_listing(root)}")
    return run


def all_runs(*, root: Path = RUNS) -> list[RunDirectory]:
    """Every run that has a state, oldest first."""
    paths = [path for path in _folders(root) if _NAME.fullmatch(path.name)]
    runs = [RunDirectory(path.name, root=root) for path in paths]
    began = [(state.started_s, run) for run in runs if (state := run.state()) is not None]
    return [run for _, run in sorted(began, key=itemgetter(0))]


def _folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []


def _listing(root: Path) -> str:
    return ", ".join(sorted(path.name for path in _folders(root))[-10:]) or "none"

"""The verb `train`: brings a run up, watches it, measures it before and after, leaves it whole."""

import argparse
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from buffer.server import RedisServer
from buffer.stats import ReplayStats
from cluster.config.file import load_config, resolved_toml
from cluster.config.schema import RunConfig
from cluster.distributed.ray_cluster import join_cluster, namespace_of
from cluster.distributed.session import RaySession
from cluster.reports.run_report import conclude, show_conclusion
from cluster.run.assembly import build_buffer
from cluster.run.directory import RunDirectory, new_name, write_whole
from cluster.run.driver import Driver
from cluster.run.local import LocalSession
from cluster.run.preflight import check_before_start
from cluster.run.session import BufferAddress, Session
from cluster.run.terminal import Terminal
from tasks.evaluation.evaluation import Evaluation, Scores

_BUFFER_STOP_S = 30.0
_BUFFER_POLL_S = 0.2


def run(arguments: argparse.Namespace) -> int:
    """Train; exit status 0 when the run is done or was stopped on request."""
    config = load_config(arguments.config, arguments.overrides)
    directory = RunDirectory(arguments.run or new_name(config.task_name))
    scores = train(
        config,
        directory,
        resume=arguments.resume,
        address=arguments.address,
        local=arguments.local,
    )
    show_conclusion(directory, scores)
    return 0


def train(
    config: RunConfig,
    directory: RunDirectory,
    *,
    resume: bool,
    address: str | None,
    local: bool,
    before: Evaluation | None = None,
    console: Console | None = None,
) -> Scores:
    """Train and measure one run, and leave its plots and report; what was measured.

    Args:
        address: of the Ray cluster to join; None: see `ClusterConfig.ray_address`, and where that
            knows none, one is started on this machine.
        local: all in this process, without Ray.
        before: the base LM as it was measured for another run of the same settings; None: measure.
        console: where progress is shown.

    Raises:
        what `check_before_start` and `Driver.drive` raise.
    """
    address = None if local else config.cluster.ray_address(address)
    check_before_start(config, directory, resume=resume, address=address, local=local)
    if address is not None:
        config = join_cluster(config, address, namespace_of(directory.name))
    directory.begin(resume=resume)
    try:
        write_whole(directory.config_file, resolved_toml(config))
        if before is not None and not directory.scores_file.exists():
            write_whole(directory.scores_file, Scores(before=before).model_dump_json(indent=2))
        with Terminal(console=console) as terminal, buffer_server(config, directory) as buffer:
            session: Session = (
                LocalSession(config, directory, buffer.address)
                if local
                else RaySession(config, directory, buffer.address, address=address)
            )
            driver = Driver(
                config,
                directory,
                session,
                terminal,
                revive_buffer=buffer.revive,
                buffer_stats=buffer.stats,
            )
            with stop_on_signal(driver.request_stop):
                scores = driver.drive()
        conclude(config, directory, scores)
    finally:
        directory.end()
    return scores


class OwnBuffer:
    """The run's Redis: one that the run keeps alive, or an external one, which is its owner's.

    It is kept alive to the very end: who ends a run often signals all of its processes at once
    (`ray job stop`, systemd, Slurm), and an orderly stop still needs the buffer.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        self._config = config
        self._directory = directory
        self._server = self._start() if config.buffer.url is None else None
        self._revived = threading.Event()
        self._failure: Exception | None = None
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep_alive, name="buffer", daemon=True)
        self._keeper.start()
        self._replay = build_buffer(
            config, run=directory.name, url=self.address.url, password=self.address.password
        )

    @property
    def address(self) -> BufferAddress:
        """Where clients connect."""
        if self._server is not None:
            return BufferAddress(url=self._server.url, password=self._server.password)
        secret = self._config.buffer.password
        return BufferAddress(
            url=str(self._config.buffer.url),
            password=None if secret is None else secret.get_secret_value(),
        )

    def revive(self) -> bool:
        """Whether a server that had died was started again since the last call.

        Raises what kept it from starting.
        """
        if self._failure is not None:
            raise self._failure
        revived = self._revived.is_set()
        self._revived.clear()
        return revived

    def stats(self) -> ReplayStats:
        """What is in the buffer now, and what became of the rest."""
        return self._replay.stats()

    def stop(self) -> None:
        """End the server in order; its files stay."""
        self._stopping.set()
        self._keeper.join()
        if self._server is not None:
            self._server.stop(timeout_s=_BUFFER_STOP_S)

    def _keep_alive(self) -> None:
        """Start a server that died again, on its files and its port."""
        while self._server is not None and not self._stopping.wait(_BUFFER_POLL_S):
            if not self._server.alive():
                try:
                    self._server = self._start()
                except Exception as error:  # the driver's to report, in its own thread
                    self._failure = error
                    return
                self._revived.set()

    def _start(self) -> RedisServer:
        return RedisServer.start(
            self._directory.buffer, run=self._directory.name, config=self._config.buffer
        )


@contextmanager
def buffer_server(config: RunConfig, directory: RunDirectory) -> Iterator[OwnBuffer]:
    """The run's Redis, for as long as the run lasts."""
    buffer = OwnBuffer(config, directory)
    try:
        yield buffer
    finally:
        buffer.stop()


@contextmanager
def stop_on_signal(request_stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks for an orderly stop; a second one interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.default_int_handler)
        request_stop()

    previous = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)

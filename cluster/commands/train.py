"""The verb `train`: brings a run up, watches it, measures it before and after, leaves it whole."""

import argparse
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from cluster.commands.plan import show_fit
from cluster.config.file import load_config, resolved_toml
from cluster.config.schema import RunConfig
from cluster.distributed.ray_cluster import join_cluster, living_nodes, may_grow, namespace_of
from cluster.distributed.session import RaySession
from cluster.reports.run_report import conclude, show_conclusion
from cluster.reports.trackers import check_trackers
from cluster.reports.tracking import Tracking
from cluster.run.directory import RunDirectory, new_name, write_whole
from cluster.run.display import inspector_address
from cluster.run.driver import Driver
from cluster.run.identity import keep_identity
from cluster.run.local import LocalSession
from cluster.run.mirror import fetch, mirrored, must_fetch
from cluster.run.own_buffer import buffer_server
from cluster.run.preflight import check_before_start
from cluster.run.resources import check_fit, with_gpu_shares
from cluster.run.session import Session
from cluster.run.terminal import Terminal, stages
from tasks.evaluation.evaluation import Evaluation, Scores


def run(arguments: argparse.Namespace) -> int:
    """Train; exit status 0 when the run is done or was stopped on request."""
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        return rehearse(config, arguments)
    return train_and_show(config, arguments, stem=config.task_name)


def rehearse(config: RunConfig, arguments: argparse.Namespace) -> int:
    """Check what `train` would, and show the plan; 0 where the run fits. Nothing is started."""
    directory = RunDirectory(arguments.run or new_name(config.task_name))
    elsewhere = must_fetch(directory, resume=arguments.resume)
    if elsewhere:
        print(f"run {directory.name!r} is fetched first, and then compared with these settings")
    config, _, address = checked(
        config,
        directory,
        resume=arguments.resume and not elsewhere,
        address=arguments.address,
        local=arguments.local,
    )
    fits = True
    if address is None:
        fits = show_fit(config)
    else:
        print(f"the cluster at {address} has the CPUs and GPUs; for their memory see plan --gpu")
    print("nothing was started: the same words without --dry-run start the run")
    return 0 if fits else 1


def train_and_show(config: RunConfig, arguments: argparse.Namespace, *, stem: str) -> int:
    """The same for a configuration and other arguments.

    Args:
        stem: of the run's name, where it is given none.
    """
    directory = RunDirectory(arguments.run or new_name(stem))
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
        what `checked` and `Driver.drive` raise.
    """
    if must_fetch(directory, resume=resume):
        fetch(directory)
    config, identity, address = checked(
        config, directory, resume=resume, address=address, local=local, console=console
    )
    directory.begin(resume=resume)
    try:
        keep_identity(directory, identity)
        write_whole(directory.config_file, resolved_toml(config))
        if before is not None and not directory.scores_file.exists():
            write_whole(directory.scores_file, Scores(before=before).model_dump_json(indent=2))
        with Terminal(console=console) as terminal, mirrored(directory, terminal.event):
            with (
                buffer_server(config, directory) as buffer,
                Tracking(config, directory, buffer.newest, terminal.event) as tracking,
            ):
                if not local:
                    # In the log of a job, which Ray's dashboard shows on the page of the job.
                    place = inspector_address(directory.name)
                    terminal.event(f"'amortize inspect --run {directory.name}' shows it at {place}")
                    terminal.event(f"joined Ray at {address}" if address else "starting Ray here")
                session: Session = (
                    LocalSession(config, directory, buffer.address)
                    if local
                    else RaySession(config, directory, buffer.address, cluster=address)
                )
                driver = Driver(config, directory, session, terminal, buffer, tracking)
                with stop_on_signal(driver.request_stop):
                    scores = driver.drive()
            conclude(config, directory, scores)
    finally:
        directory.end()
    return scores


def checked(
    config: RunConfig,
    directory: RunDirectory,
    *,
    resume: bool,
    address: str | None,
    local: bool,
    console: Console | None = None,
) -> tuple[RunConfig, dict[str, Any], str | None]:
    """What a run starts with, once all is checked: settings, identity, the Ray cluster to join.

    Raises what `check_trackers`, `check_before_start`, `join_cluster` and `check_fit` raise.
    """
    address = None if local else config.cluster.ray_address(address)
    if address is None and not local:
        config = with_gpu_shares(config, torch.cuda.device_count())
    check_trackers(config.tracking.trackers)
    with stages(console or Console()) as progress:
        progress("checking the model, the data and where they fit")
        identity = check_before_start(
            config, directory, resume=resume, address=address, local=local
        )
    if address is not None:
        config = join_cluster(config, address, namespace_of(directory.name))
        if not may_grow():
            check_fit(config, living_nodes())
    return config, identity, address


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

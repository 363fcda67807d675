"""The verb `inspect`: shows the trajectories of a run in a browser, until it is interrupted."""

import argparse
import signal
import threading

from cluster.commands.stop import the_live_run
from cluster.config.file import load_config
from cluster.config.placement import ClusterConfig
from cluster.config.project import UserError
from cluster.inspector.access import TOKEN_PARAMETER, keep_token
from cluster.inspector.app import Target
from cluster.inspector.keeper import BufferKeeper
from cluster.inspector.serve import served_by_ray, served_here
from cluster.run.directory import RunDirectory, RunState, all_runs, find_run

_WATCH_S = 2.0


def run(arguments: argparse.Namespace) -> int:
    """Serve the inspector; ends on Ctrl-C, SIGTERM, or with the Ray cluster that it runs on."""
    directory = find_run(arguments.run) if arguments.run else the_run_of_interest()
    config = load_config(str(directory.config_file), arguments.overrides)
    ended = threading.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: ended.set())
    with BufferKeeper(config, directory) as keeper:
        url, password = keeper.address
        target = Target(
            config=config,
            run=directory.name,
            root=directory.path.parent,
            buffer_url=url,
            buffer_password=password,
            token=keep_token(directory.path),
        )
        if arguments.no_serve:
            serving = served_here(target, port=arguments.port)
        else:
            address = arguments.address or ray_address(directory.state())
            serving = served_by_ray(target, port=arguments.port, address=address)
        with serving as place:
            print(f"inspector of {directory.name}: {place.url}?{TOKEN_PARAMETER}={target.token}")
            if place.dashboard:
                print(f"listed in Ray's dashboard: {place.dashboard}")
            print("Ctrl-C ends it", flush=True)
            while not ended.wait(_WATCH_S):
                keeper.watch()
                place.watch()
    return 0


def the_run_of_interest() -> RunDirectory:
    """The one that goes on, else the newest; raises UserError."""
    if found := the_live_run() or next(reversed(list(all_runs())), None):
        return found
    raise UserError("no runs here yet: 'amortize train CONFIG' starts one")


def ray_address(state: RunState | None) -> str | None:
    """The Ray cluster that a run goes on on, or that RAY_ADDRESS names; None: there is none."""
    return ClusterConfig().ray_address(state.address if state and state.goes_on else None)

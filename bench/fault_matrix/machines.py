"""A Ray cluster of three machines on this one: a head for the driver, and two nodes that work.

Each is a host in namespaces of its own (`tests/hosts.py`). A lost node shows in seconds instead of
half a minute, as the settings of Ray's health checks say.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from bench.posterior import descendants, title
from tests.hosts import Host, network

SHARED = "/srv/amortize"
ADDRESSES = {"head": "10.77.7.1", "node-1": "10.77.7.2", "node-2": "10.77.7.3"}
ADDRESS = f"{ADDRESSES['head']}:6379"
CPUS = 2  # that each node offers: room for all parts of the job
_START_S = 120.0
_CLONE_NEWNET = 0x40000000
_SETTINGS = (
    "RAY_worker_niceness=0",  # a busy machine would starve nice ones
    "OMP_NUM_THREADS=1",
    "RAY_USAGE_STATS_ENABLED=0",
    "RAY_health_check_period_ms=1000",
    "RAY_health_check_timeout_ms=5000",
    "RAY_health_check_failure_threshold=3",
)


class Machines:
    """The hosts, with Ray on each."""

    def __init__(self, hosts: dict[str, Host]) -> None:
        self.head = hosts["head"]
        self._nodes = [hosts["node-1"], hosts["node-2"]]
        self._start_ray(self.head, "--head --port=6379 --num-cpus=0 --include-dashboard=false")
        self.mend()

    def holder(self, word: str) -> Host:
        """The node on which a process runs whose title has `word`."""
        return next(
            node
            for node in self._nodes
            if any(word in title(each) for each in descendants(psutil.Process(node.pid)))
        )

    def mend(self) -> None:
        """Have each node work: one whose Ray does not, from the beginning."""
        for node in self._nodes:
            living = descendants(psutil.Process(node.pid))
            states = {each.status() for each in living if "raylet" in title(each)}
            if states - {psutil.STATUS_STOPPED}:
                continue
            self._start_ray(node, f"--address={ADDRESS} --num-cpus={CPUS}")

    def _start_ray(self, host: Host, arguments: str, *, tries: int = 3) -> None:
        """Start Ray on a host, again where a busy machine lets it miss Ray's own deadlines."""
        while True:
            living = descendants(psutil.Process(host.pid))
            for each in living:
                each.kill()
            psutil.wait_procs(living, timeout=_START_S)
            tries -= 1
            try:
                self._run_ray(host, arguments)
            except AssertionError:
                if not tries:
                    raise
            else:
                return

    def _run_ray(self, host: Host, arguments: str) -> None:
        memory = "--object-store-memory=100000000"
        host.run(
            f"env {' '.join(_SETTINGS)} ray start {arguments} {memory} "
            f"--node-ip-address={host.address}",
            timeout_s=_START_S,
        )


@contextmanager
def machines(folder: Path) -> Iterator[Machines]:
    """Three machines that see `folder`/shared as SHARED; this thread is on the head's network."""
    with network(ADDRESSES, folder=folder, shared=SHARED) as hosts, _network_of(hosts["head"].pid):
        yield Machines(hosts)


@contextmanager
def _network_of(pid: int) -> Iterator[None]:
    """Have this thread, and those that it starts, see the network that a process sees."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _enter(os.open(f"/proc/{pid}/ns/net", os.O_RDONLY))
        try:
            yield
        finally:
            _enter(os.dup(own))
    finally:
        os.close(own)


def _enter(network: int) -> None:
    """Enter a network by its descriptor, and close that."""
    library = ctypes.CDLL(None, use_errno=True)
    failed = library.setns(network, _CLONE_NEWNET)
    os.close(network)
    if failed:
        raise OSError(ctypes.get_errno(), "setns")

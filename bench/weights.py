"""Weights from the learner to the actors: in the background, beside what was, waited for.

A store process takes a version of an adapter, and all readers, a process each, ask for it at once;
while they fetch it, the next version is published.

    by value        the store answers each reader with the bytes
    by reference    with a reference: one transfer for a node
    in background   the same, published and fetched by threads; a reader asks again and again, as
                    an actor does before each batch

    publish_s          one publication, nobody reading, until the store has it
    fetch_s            from the first request until the last reader has the bytes
    blocked_learner_s  how long the publication that comes while all read holds the learner up
    copies             of the adapter in Ray's object store once that is taken: no peak
    blocked_actor_s    a reader's longest wait for one answer, their mean

Where the readers' own copies would take more than `--memory-gb`, they read the bytes where the node
holds them (`read`: in place), which the store's bytes alone cannot be: such rows by value are left
out, and said so. Times are of one machine, medians of `--repeats`.

    python bench/weights.py [--json] [--memory-gb 6] [--repeats 3] [--adapter-mb 4 250 1000]
"""

import argparse
import itertools
import json
import re
import statistics
import sys
import time
from typing import Any

import numpy as np
import ray
from ray._private.internal_api import memory_summary

from actors.weight_sources import FetchedAhead, Published, PublishedWeights, WeightSource
from cluster.distributed.clients import RemoteWeightStore
from cluster.distributed.learner_worker import BackgroundPublisher
from cluster.distributed.services import Service, WeightStoreService
from cluster.distributed.waiting import wait_for
from cluster.run.weight_store import WeightStore
from learner.learner import WeightSink

SIZES_MB = (4, 250, 1000)
READERS = (1, 8, 16)
VERSIONS = itertools.count()  # of all rows: what a reader still holds of an earlier one is older
TIMEOUT_S = 300.0
BATCH_S = 0.05  # between two questions of a reader


class ByValueService(Service, WeightStore[bytes]):
    """What the store was: it answers every reader with the bytes."""


class ByValueClient(RemoteWeightStore):
    """And its client."""

    def newer_than(self, version: int) -> PublishedWeights | None:
        return self._ask("newer_than", version)

    def publish(self, data: bytes, *, version: int, checksum: str) -> None:
        self._ask("publish", data, version=version, checksum=checksum)


class InPlaceClient(RemoteWeightStore):
    """Reads the bytes where they lie, without a copy of its own."""

    def newer_than(self, version: int) -> Any:
        if (fresh := self._ask("newer_than", version)) is None:
            return None
        data_N = wait_for(fresh.data, peer=self.peer, phase="fetch", timeout_s=TIMEOUT_S)
        data_N.max()  # goes over every page
        return Published(fresh.version, data_N, fresh.checksum)


PATHS = {
    "by value": (ByValueService, ByValueClient),
    "by reference": (WeightStoreService, RemoteWeightStore),
    "in background": (WeightStoreService, RemoteWeightStore),
}


class Reader:
    """An actor of a run, as far as weights go; one process in all rows."""

    def __init__(self) -> None:
        self._background = False
        self._ahead: FetchedAhead | None = None

    def open(self, path: str, handle: Any, *, in_place: bool) -> None:
        """Make ready to fetch."""
        client = InPlaceClient if in_place else PATHS[path][1]
        self._client: WeightSource = client(handle, timeout_s=TIMEOUT_S)
        self._background = path == "in background"
        if self._background and self._ahead is None:
            self._ahead = FetchedAhead(self)

    def close(self) -> None:
        """Give up what was fetched ahead, and fetch no more."""
        self._background = False
        if self._ahead is not None:
            self._ahead.newer_than(sys.maxsize)

    def newer_than(self, version: int) -> PublishedWeights | None:
        """For the thread that fetches ahead."""
        return self._client.newer_than(version) if self._background else None

    def fetch(self, version: int) -> tuple[float, int]:
        """Seconds that the longest question took, and bytes that came."""
        source = self._ahead if self._background and self._ahead else self._client
        longest_s = 0.0
        while True:
            began = time.monotonic()
            fresh = source.newer_than(version)
            longest_s = max(longest_s, time.monotonic() - began)
            if fresh is not None:
                return longest_s, len(fresh.data)
            time.sleep(BATCH_S)


def stored_mb() -> float:
    """Of Ray's object store, in use."""
    address = ray.get_runtime_context().gcs_address
    found = re.search(r"Plasma memory usage (\d+) MiB", memory_summary(address, stats_only=True))
    assert found is not None
    return float(found[1])


def measure(
    path: str, size_mb: int, actors: list[Any], repeats: int, *, in_place: bool
) -> dict[str, object]:
    """One row, with these readers."""
    service, client = PATHS[path]
    handle = ray.remote(service).options(num_cpus=0).remote()
    store = client(handle, timeout_s=TIMEOUT_S)
    learner = BackgroundPublisher(store) if path == "in background" else store
    opened = [actor.open.remote(path, handle, in_place=in_place) for actor in actors]
    ray.get([handle.ping.remote(), *opened], timeout=TIMEOUT_S)
    data, empty_mb = np.random.default_rng(0).bytes(size_mb * 2**20), stored_mb()
    times: dict[str, list[float]] = {}

    def note(**seconds: float) -> None:
        for name, value in seconds.items():
            times.setdefault(name, []).append(value)

    def publish(version: int, sink: WeightSink = store) -> float:
        began = time.monotonic()
        sink.publish(data, version=version, checksum=str(version))
        return time.monotonic() - began

    for _ in range(repeats):
        version = next(VERSIONS)
        note(publish_s=publish(version))
        began = time.monotonic()
        asked = [actor.fetch.remote(version - 1) for actor in actors]
        note(blocked_learner_s=publish(next(VERSIONS), learner))
        if isinstance(learner, BackgroundPublisher):
            learner.finish()
        note(copies=(stored_mb() - empty_mb) / size_mb)
        waited = ray.get(asked, timeout=TIMEOUT_S)
        assert all(size == len(data) for _, size in waited)
        note(fetch_s=time.monotonic() - began)
        note(blocked_actor_s=statistics.mean(seconds for seconds, _ in waited))
    ray.get([actor.close.remote() for actor in actors], timeout=TIMEOUT_S)
    ray.kill(handle)
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    medians["copies"] = round(max(times["copies"]), 1)
    read = "in place" if in_place else "copied"
    return {"path": path, "adapter_mb": size_mb, "readers": len(actors), "read": read} | medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--memory-gb", type=float, default=6.0, help="that readers may hold")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--adapter-mb", type=int, nargs="+", default=SIZES_MB)
    parser.add_argument("--readers", type=int, nargs="+", default=READERS)
    arguments = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    rows, left_out = [], []
    start = ray.remote(Reader).options(num_cpus=0).remote
    actors = [start() for _ in range(max(arguments.readers))]
    for size_mb, readers, path in itertools.product(arguments.adapter_mb, arguments.readers, PATHS):
        # The store has two versions, the learner one, and one is on its way.
        copies = 4 + readers * (1 if path == "by reference" else 2)
        in_place = size_mb * copies > arguments.memory_gb * 1024
        if in_place and path == "by value":
            left_out.append({"path": path, "adapter_mb": size_mb, "readers": readers})
            continue
        chosen = actors[:readers]
        rows.append(measure(path, size_mb, chosen, arguments.repeats, in_place=in_place))
        if not arguments.json:
            print(rows[-1], flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows, "left_out": left_out}))
    elif left_out:
        print("left out, for their memory:", left_out)


if __name__ == "__main__":
    main()

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

Rows that would hold more than `--memory-gb` in readers and store are left out and said so. Times
are of one machine, medians of `--repeats`.

    python bench/weights.py [--json] [--memory-gb 6] [--repeats 3] [--adapter-mb 4 250 1000]
"""

import argparse
import json
import re
import statistics
import time
from typing import Any

import numpy as np
import ray
from ray._private.internal_api import memory_summary

from actors.weight_sources import FetchedAhead, PublishedWeights, WeightSource
from cluster.distributed.clients import RemoteWeightStore
from cluster.distributed.learner_worker import BackgroundPublisher
from cluster.distributed.services import Service, WeightStoreService
from cluster.run.weight_store import WeightStore
from learner.learner import WeightSink

SIZES_MB = (4, 250, 1000)
READERS = (1, 8, 16)
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


PATHS = {
    "by value": (ByValueService, ByValueClient),
    "by reference": (WeightStoreService, RemoteWeightStore),
    "in background": (WeightStoreService, RemoteWeightStore),
}


class Reader:
    """An actor of a run, as far as weights go."""

    def __init__(self, path: str, handle: Any) -> None:
        weights: WeightSource = PATHS[path][1](handle, timeout_s=TIMEOUT_S)
        self._weights = FetchedAhead(weights) if path == "in background" else weights

    def ready(self) -> None:
        """Answer once this process stands."""

    def fetch(self, version: int) -> tuple[float, int]:
        """Seconds that the longest question took, and bytes that came."""
        longest_s = 0.0
        while True:
            began = time.monotonic()
            fresh = self._weights.newer_than(version)
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


def measure(path: str, size_mb: int, readers: int, repeats: int) -> dict[str, object]:
    service, client = PATHS[path]
    handle = ray.remote(service).options(num_cpus=0).remote()
    store = client(handle, timeout_s=TIMEOUT_S)
    learner = BackgroundPublisher(store) if path == "in background" else store
    start = ray.remote(Reader).options(num_cpus=0).remote
    actors = [start(path, handle) for _ in range(readers)]
    ray.get([actor.ready.remote() for actor in actors], timeout=TIMEOUT_S)
    data, empty_mb = np.random.default_rng(0).bytes(size_mb * 2**20), stored_mb()
    times: dict[str, list[float]] = {}

    def note(**seconds: float) -> None:
        for name, value in seconds.items():
            times.setdefault(name, []).append(value)

    def publish(version: int, sink: WeightSink = store) -> float:
        began = time.monotonic()
        sink.publish(data, version=version, checksum=str(version))
        return time.monotonic() - began

    for version in range(0, 2 * repeats, 2):
        note(publish_s=publish(version))
        began = time.monotonic()
        asked = [actor.fetch.remote(version - 1) for actor in actors]
        note(blocked_learner_s=publish(version + 1, learner))
        if isinstance(learner, BackgroundPublisher):
            learner.finish()
        note(copies=(stored_mb() - empty_mb) / size_mb)
        waited = ray.get(asked, timeout=TIMEOUT_S)
        assert all(size == len(data) for _, size in waited)
        note(fetch_s=time.monotonic() - began)
        note(blocked_actor_s=statistics.mean(seconds for seconds, _ in waited))
    for process in (*actors, handle):
        ray.kill(process)
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    medians["copies"] = round(max(times["copies"]), 1)
    return {"path": path, "adapter_mb": size_mb, "readers": readers} | medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--memory-gb", type=float, default=6.0, help="that readers may hold")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--adapter-mb", type=int, nargs="+", default=SIZES_MB)
    arguments = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    rows, left_out = [], []
    for size_mb in arguments.adapter_mb:
        for readers in READERS:
            for path in PATHS:
                copies = readers * (2 if path == "by value" else 1) + 4
                if size_mb * copies > arguments.memory_gb * 1024:
                    left_out.append({"path": path, "adapter_mb": size_mb, "readers": readers})
                    continue
                rows.append(measure(path, size_mb, readers, arguments.repeats))
                if not arguments.json:
                    print(rows[-1], flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows, "left_out": left_out}))
    elif left_out:
        print("left out, for their memory:", left_out)


if __name__ == "__main__":
    main()

"""Weights from the learner to the actors: by reference, beside what it was, by value.

A store process takes a version of an adapter, and all readers, a process each, fetch it at once;
while they do, the next version is published.

    publish_s          one publication, nobody reading
    fetch_s            from the first request until the last reader has the bytes
    blocked_learner_s  the publication that comes while all read
    copies             of the adapter in Ray's object store once that is taken: no peak
    blocked_actor_s    a reader's wait, their mean

Rows that would hold more than `--memory-gb` in readers are left out and said so. Times are of one
machine, medians of `--repeats`.

    python bench/weights.py [--json] [--memory-gb 6] [--repeats 3]
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

from actors.weight_sources import PublishedWeights
from cluster.distributed.clients import RemoteWeightStore
from cluster.distributed.services import Service, WeightStoreService
from cluster.run.weight_store import WeightStore

SIZES_MB = (4, 250, 1000)
READERS = (1, 8, 16)
TIMEOUT_S = 300.0


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
}


class Reader:
    """An actor of a run, as far as weights go."""

    def __init__(self, client: type[RemoteWeightStore], handle: Any) -> None:
        self._weights = client(handle, timeout_s=TIMEOUT_S)

    def ready(self) -> None:
        """Answer once this process stands."""

    def fetch(self, version: int) -> tuple[float, int]:
        """Seconds, and bytes that came."""
        began = time.monotonic()
        fresh = self._weights.newer_than(version)
        assert fresh is not None
        return time.monotonic() - began, len(fresh.data)


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
    start = ray.remote(Reader).options(num_cpus=0).remote
    actors = [start(client, handle) for _ in range(readers)]
    ray.get([actor.ready.remote() for actor in actors], timeout=TIMEOUT_S)
    data, empty_mb = np.random.default_rng(0).bytes(size_mb * 2**20), stored_mb()
    times: dict[str, list[float]] = {}

    def note(**seconds: float) -> None:
        for name, value in seconds.items():
            times.setdefault(name, []).append(value)

    def publish(version: int) -> float:
        began = time.monotonic()
        store.publish(data, version=version, checksum=str(version))
        return time.monotonic() - began

    for version in range(0, 2 * repeats, 2):
        note(publish_s=publish(version))
        began = time.monotonic()
        asked = [actor.fetch.remote(version - 1) for actor in actors]
        note(blocked_learner_s=publish(version + 1))
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
    arguments = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    rows, left_out = [], []
    for size_mb in SIZES_MB:
        for readers in READERS:
            if size_mb * readers > arguments.memory_gb * 1024:
                left_out.append({"adapter_mb": size_mb, "readers": readers})
                continue
            for path in PATHS:
                rows.append(measure(path, size_mb, readers, arguments.repeats))
                if not arguments.json:
                    print(rows[-1], flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows, "left_out": left_out}))
    elif left_out:
        print("left out, for their memory:", left_out)


if __name__ == "__main__":
    main()

"""The metrics of a run, handed to Ray: its nodes offer them to Prometheus."""

from collections.abc import Mapping
from dataclasses import asdict

from ray.util.metrics import Counter, Gauge

from buffer.stats import ReplayStats
from cluster.distributed.metric_definitions import INSTRUMENTS, Source

_TAGS = ("run", "part")
_SOURCES = {"actor": Source.ACTOR, "reward": Source.REPLICA, "learner": Source.LEARNER}


class Telemetry:
    """Tells Ray what has changed. Cheap; only in a process that has joined a Ray cluster.

    Ray forgets a gauge that is not set for two of its report intervals (20 s unless
    RAY_metrics_report_interval_ms says otherwise), so parts that are gone show no old values.
    """

    def __init__(self, run: str) -> None:
        every = [each for group in INSTRUMENTS.values() for each in group]
        self._run = run
        self._counters = {
            each.name: Counter(each.name, each.description, _TAGS)
            for each in every
            if each.is_counter
        }
        self._gauges = {
            each.name: Gauge(each.name, each.description, _TAGS)
            for each in every
            if not each.is_counter
        }
        self._told: dict[tuple[str, str, int], float] = {}

    def tell_part(self, name: str, status: Mapping[str, float], *, life: int) -> None:
        """What a part of the run says of itself; `life` as for `tell`."""
        self.tell(_SOURCES[name.partition("-")[0]], status, part=name, life=life)
        self.tell(Source.PART, {"restarts": life}, part=name)

    def tell_run(
        self,
        learner: Mapping[str, float],
        buffer: ReplayStats,
        counts: Mapping[str, Mapping[str, int]],
    ) -> None:
        """The learner's metrics, the buffer, and how many parts are desired and actual."""
        self.tell(Source.LEARNER, learner, part="learner")
        self.tell(Source.BUFFER, asdict(buffer) | asdict(buffer.counters), part="buffer")
        for kind, desired in counts["desired"].items():
            values = {"desired": desired, "running": counts["actual"][kind]}
            self.tell(Source.KIND, values, part=kind)

    def tell(
        self, source: Source, values: Mapping[str, float], *, part: str, life: int = 0
    ) -> None:
        """Pass on those values of one part that have a metric.

        Args:
            values: counters as totals since the part's start.
            life: how often the part was started before; its counters began at zero each time.
        """
        tags = {"run": self._run, "part": part}
        for instrument in INSTRUMENTS[source]:
            if (value := values.get(instrument.key)) is None:
                continue
            if not instrument.is_counter:
                self._gauges[instrument.name].set(value, tags)
                continue
            told = self._told.get(series := (instrument.name, part, life), 0.0)
            if value > told:
                self._counters[instrument.name].inc(value - told, tags)
                self._told[series] = value

"""What the processes of a run are told is what `config.toml` in the run's folder says."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.commands import train as verb
from cluster.config.file import load_config
from cluster.config.schema import RunConfig
from cluster.distributed import ray_cluster, session
from cluster.distributed.launcher import Launcher
from cluster.run.directory import RunDirectory
from cluster.run.session import BufferAddress


class Stop(Exception):
    """The test has seen enough."""


class Buffer:
    address = BufferAddress(url="redis://10.0.0.7:1/0", password=None)

    def revived(self) -> str:
        return ""

    def stats(self) -> None:
        raise AssertionError

    def newest(self) -> None:
        raise AssertionError


@pytest.mark.parametrize("address", ["10.0.0.7:6379", None])
def test_workers_get_what_the_run_folder_says(
    address: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[RunConfig] = []

    @contextmanager
    def buffer_server(config: RunConfig, directory: RunDirectory) -> Iterator[Buffer]:
        yield Buffer()

    def evaluate(run: session.RaySession, *_: object, **__: object) -> None:
        told.append(run._context.config)
        raise Stop

    for module in (ray_cluster, session):
        monkeypatch.setattr(module, "connect_ray", lambda *_: None)
    monkeypatch.setattr(ray_cluster.ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    here = SimpleNamespace(gcs_address="127.0.0.1:1")
    monkeypatch.setattr(session.ray, "get_runtime_context", lambda: here)
    for module in (verb, session):
        monkeypatch.setattr(module, "may_grow", lambda: True)
    monkeypatch.setattr(session, "check_fit", lambda *_: None)
    monkeypatch.setattr(session, "living_nodes", lambda: [])
    monkeypatch.setattr(Launcher, "service", lambda *_: None)
    monkeypatch.setattr(session.RaySession, "_check_services", lambda *_: None)
    monkeypatch.setattr(session.RaySession, "evaluate", evaluate)
    monkeypatch.setattr(verb, "check_before_start", lambda *_, **__: {})
    monkeypatch.setattr(verb, "buffer_server", buffer_server)
    monkeypatch.setattr(verb.torch.cuda, "device_count", lambda: 2)  # of this machine
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    directory = RunDirectory("r", root=tmp_path)
    config = load_config("tasks/toy.toml", ["learner.starvation_timeout_s=7.0"])
    with pytest.raises(Stop):
        verb.train(config, directory, resume=False, address=address, local=False)
    assert told == [load_config(str(directory.config_file))]
    # Ray started here takes this machine's GPUs; another cluster has its own.
    assert told[0].cluster.learner_placement.gpus == (0.5 if address is None else 0.0)
    assert told[0].buffer.bind == ("auto" if address is None else "10.0.0.7")
    assert told[0].learner.starvation_timeout_s == 7.0


def test_less_patience_with_parts_than_ray_has_with_nodes_is_told() -> None:
    assert ray_cluster.hasty(load_config("tasks/toy.toml")) == ""
    said = ray_cluster.hasty(load_config("tasks/toy.toml", ["cluster.silence_timeout_s=65"]))
    assert said.startswith("cluster.silence_timeout_s (65) is no longer than Ray needs")
    assert "(65 s)" in said and "RAY_health_check_period_ms" in said

"""Trackers: what they are told, that only those asked for are, and that none can harm a run."""

import importlib.util
import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.__main__ import main
from cluster.config.file import load_config
from cluster.config.project import UserError
from cluster.config.tracking import TrackerName
from cluster.config.validation import ConfigError
from cluster.reports import trackers, tracking
from cluster.reports.score_table import Grid
from cluster.reports.trackers import TRACKERS, TrackedRun, check_trackers
from cluster.reports.tracking import Tracking, Worker
from cluster.run.directory import RunDirectory
from tasks.evaluation.evaluation import Evaluation, Metric, Scores
from tests.buffer_toy import toy_trajectory

SMALL = [
    *(
        "learner.steps=3",
        "task.max_len=2",
        "learner.groups_per_step=2",
        "actors.groups_per_batch=2",
    ),
    *("actors.group_size=4", "buffer.kind=memory", "posterior.prompts=1"),
]
HALF = Evaluation(
    task="toy",
    temperature=1.0,
    step=6,
    metrics={"tv": Metric(label="total variation", value=0.5, better="lower", items=3)},
)


def tracked(folder: Path, name: str = "mine") -> TrackedRun:
    return TrackedRun(name=name, project="sums", folder=folder, config={"seed": 1})


def use(tracker: Any) -> None:
    tracker.scalars({"loss/value": 1.5}, 7)
    tracker.table(Grid("rationales", ("prompt", "right"), [("1 + 1", "wrong")]), 7)
    tracker.close()


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.told.append((step, dict(values)))

    def table(self, grid: Grid, step: int) -> None:
        self.told.append((step, grid.title, list(grid.rows)))

    def close(self) -> None:
        self.told.append("closed")


def test_a_list_names_trackers_and_a_section_says_more(tmp_path: Path) -> None:
    toy = load_config("tasks/toy.toml")
    assert toy.tracking.trackers == () and toy.tracking.project == "amortize"
    listed = load_config("tasks/toy.toml", ['tracking=["tensorboard", "wandb"]'])
    assert listed.tracking.trackers == ("tensorboard", "wandb")
    more = load_config("tasks/toy.toml", ['tracking.trackers=["mlflow"]', "tracking.project=a"])
    assert (more.tracking.trackers, more.tracking.project) == (("mlflow",), "a")
    with pytest.raises(ConfigError, match="tensorboard"):
        load_config("tasks/toy.toml", ['tracking=["tensorbord"]'])


def test_tensorboard_shows_what_metrics_jsonl_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cluster.commands.train.conclude", lambda *_: None)  # draws for seconds
    arguments = ["tasks/toy.toml", "--run", "mine", "--local", *SMALL]
    assert main(["train", *arguments, 'tracking=["tensorboard"]']) == 0
    rows = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    shown = EventAccumulator("runs/mine/tensorboard").Reload()
    assert [row["step"] for row in rows] == [1, 2, 3]
    for key in rows[-1].keys() - {"step"}:
        wanted = {row["step"]: row[key] for row in rows if key in row}
        told = {event.step: event.value for event in shown.Scalars(key)}
        assert told == pytest.approx(wanted, rel=1e-5), key
    scores = Scores.model_validate_json(Path("runs/mine/scores.json").read_bytes())
    assert scores.before is not None and scores.after is not None
    told = {event.step: event.value for event in shown.Scalars("evaluation/tv")}
    known = {0: scores.before.value("tv"), 3: scores.after.value("tv")}
    assert told == pytest.approx(known, rel=1e-5)
    texts = shown.Tags()["tensors"]
    assert {"rationales/text_summary", "before and after/text_summary"} <= set(texts)


def test_nobody_is_told_where_nobody_is_asked_for(tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError("a sample was taken")

    before = threading.active_count()
    with Tracking(load_config("tasks/toy.toml"), RunDirectory("r", root=tmp_path), never, print):
        assert threading.active_count() == before
    assert not list(tmp_path.iterdir())


def test_each_tracker_hears_rows_scores_and_samples_when_they_are_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setitem(TRACKERS, "wandb", lambda run: recorder)
    config = load_config(
        "tasks/toy.toml", ['tracking.trackers=["wandb"]', "tracking.samples_every_steps=3"]
    )
    groups = iter([(), *([(toy_trajectory((1, 2), correct=True),)] * 9)])
    events: list[str] = []
    directory = RunDirectory("r", root=tmp_path)
    with Tracking(config, directory, lambda: next(groups), events.append) as told:
        for step in range(1, 7):
            told.row({"step": float(step), "loss/value": step / 2})
        told.scores(Scores(after=HALF))
    assert [one for one in recorder.told if one[1:] and isinstance(one[1], dict)] == [
        *((step, {"loss/value": step / 2}) for step in range(1, 7)),
        (6, {"evaluation/tv": 0.5}),
    ]
    samples = [one for one in recorder.told if one[1] == "rationales"]
    # Due behind the first step, where none waited; then three steps later.
    assert [step for step, *_ in samples] == [2, 5]
    assert samples[0][2][0][3:] == ("-1.000", "right", "0", "on_policy, temperature 1")
    assert (6, "before and after", [("total variation", "3", "", "0.500")]) in recorder.told
    assert recorder.told[-1] == "closed" and not events


def test_a_tracker_that_fails_is_named_once_and_counted() -> None:
    events: list[str] = []

    def refuse(_: object) -> None:
        raise OSError("no network")

    worker = Worker("wandb", lambda: None, events.append)
    worker.end(5)
    broken = Worker("wandb", lambda: 1, events.append)
    for _ in range(3):
        broken.put(refuse)
    done: list[int] = []
    broken.put(done.append)
    broken.end(5)
    assert done == [1], "it is told again what comes later"
    assert len(events) == 2 and events[1] == "tracking: wandb failed 3 times"
    assert events[0].startswith("tracking: wandb: OSError: no network; the run goes on")


def test_a_tracker_that_does_not_open_is_named_and_goes_without() -> None:
    events: list[str] = []
    done: list[Any] = []

    def closed() -> Any:
        raise UserError("nobody is logged in")

    worker = Worker("wandb", closed, events.append)
    worker.put(done.append)
    worker.end(5)
    assert not done and len(events) == 1 and "nobody is logged in" in events[0]


def test_a_tracker_that_hangs_is_left_behind() -> None:
    events: list[str] = []
    released = threading.Event()
    worker = Worker("wandb", lambda: 1, events.append)

    def hang(_: object) -> None:
        released.wait(60)

    worker.put(hang)
    worker.put(lambda _: None)
    worker.end(0.1)
    released.set()
    assert events == ["tracking: wandb hung for 0 s; 1 not sent"]


def test_a_failing_buffer_costs_the_sample_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setitem(TRACKERS, "wandb", lambda run: recorder)
    config = load_config("tasks/toy.toml", ['tracking=["wandb"]'])
    events: list[str] = []

    def gone() -> Any:
        raise ConnectionError("redis is gone")

    with Tracking(config, RunDirectory("r", root=tmp_path), gone, events.append) as told:
        told.row({"step": 1.0, "loss/value": 2.0})
    assert recorder.told == [(1, {"loss/value": 2.0}), "closed"]
    assert len(events) == 1 and "rationales: ConnectionError: redis is gone" in events[0]


@pytest.mark.parametrize("name", TRACKERS)
def test_what_is_not_installed_is_said_before_the_run_begins(
    name: TrackerName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda library: None)
    with pytest.raises(UserError, match=f"{name} is not installed: 'pip install {name}'"):
        check_trackers([name])
    assert main(["train", "tasks/toy.toml", "--local", f'tracking=["{name}"]']) == 1
    assert "is not installed" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_text_of_a_model_is_no_markup_in_tensorboard(tmp_path: Path) -> None:
    tracker = TRACKERS["tensorboard"](tracked(tmp_path))
    tracker.table(Grid("rationales", ("prompt",), [("a | <b>\n[x](y)",)]), 7)
    tracker.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = shown.Tensors("rationales/text_summary")
    (text,) = event.tensor_proto.string_val
    assert text.decode() == "| prompt |\n| --- |\n| a &#124; &#60;b&#62;↵&#91;x&#93;&#40;y&#41; |"


def test_wandb_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(
        id="abc",
        define_metric=lambda *a, **k: calls.append(("define", a, k)),
        log=lambda values: calls.append(("log", values)),
        finish=lambda: calls.append("finish"),
    )

    def init(**how: Any) -> Any:
        calls.append(how)
        return run

    library: Any = SimpleNamespace(
        setup=lambda: SimpleNamespace(settings=SimpleNamespace(mode="online")),
        login=lambda prompt: True,
        init=init,
        Table=lambda columns, data: (columns, data),
    )
    monkeypatch.setitem(sys.modules, "wandb", library)
    use(TRACKERS["wandb"](tracked(tmp_path)))
    how = {"project": "sums", "name": "mine", "id": None, "resume": "allow"}
    assert calls == [
        how | {"dir": str(tmp_path), "config": {"seed": 1}},
        ("define", ("*",), {"step_metric": "step"}),
        ("log", {"loss/value": 1.5, "step": 7}),
        ("log", {"rationales": (["prompt", "right"], [["1 + 1", "wrong"]]), "step": 7}),
        "finish",
    ]
    TRACKERS["wandb"](tracked(tmp_path))
    assert calls[5]["id"] == "abc", "a run that goes on is the same run there"
    library.login = lambda prompt: prompt
    with pytest.raises(UserError, match="WANDB_MODE=offline"):
        TRACKERS["wandb"](tracked(tmp_path))


def test_mlflow_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Client:
        def get_experiment_by_name(self, name: str) -> None:
            calls.append(("experiment", name))

        def create_experiment(self, name: str) -> str:
            return f"number of {name}"

        def create_run(self, number: str, run_name: str) -> Any:
            calls.append((number, run_name))
            return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

        def log_dict(self, id: str, values: Any, file: str) -> None:
            calls.append((id, values, file))

        def log_batch(self, id: str, metrics: Any) -> None:
            calls.append((id, [(key, value, step) for key, value, _, step in metrics]))

        def set_terminated(self, id: str) -> None:
            calls.append(("end", id))

    library: Any = SimpleNamespace(
        MlflowClient=Client, entities=SimpleNamespace(Metric=lambda *four: four)
    )
    monkeypatch.setitem(sys.modules, "mlflow", library)
    use(TRACKERS["mlflow"](tracked(tmp_path)))
    assert calls == [
        ("experiment", "sums"),
        ("number of sums", "mine"),
        ("abc", {"seed": 1}, "config.json"),
        ("abc", [("loss/value", 1.5, 7)]),
        ("abc", {"prompt": ["1 + 1"], "right": ["wrong"]}, "rationales/00000007.json"),
        ("end", "abc"),
    ]
    TRACKERS["mlflow"](tracked(tmp_path))
    assert calls[6:] == [("abc", {"seed": 1}, "config.json")], "the same run again"


def test_trackio_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    library: Any = SimpleNamespace(
        init=lambda **how: calls.append(how),
        log=lambda values, step: calls.append((values, step)),
        Table=lambda columns, data: (columns, data),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "trackio", library)
    use(TRACKERS["trackio"](tracked(tmp_path)))
    assert calls == [
        {"project": "sums", "name": "mine", "resume": "allow", "config": {"seed": 1}},
        ({"loss/value": 1.5}, 7),
        ({"rationales": (["prompt", "right"], [["1 + 1", "wrong"]])}, 7),
        "finish",
    ]


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    for module in (trackers, tracking):
        assert not {"wandb", "mlflow", "trackio", "tensorboard"} & vars(module).keys()

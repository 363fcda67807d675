"""The command line as a person meets it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.__main__ import main
from cluster.cli import parse
from cluster.run.directory import RunDirectory, first_state
from cluster.run.display import BUFFER_SIZE, LOSS, TIME_LEFT_S, TRAJECTORIES_PER_S
from cluster.run.terminal import plain_line

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from cluster.__main__ import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'redis', 'pydantic', 'numpy'}\n"
        "sys.exit(bool(heavy & sys.modules.keys()))"
    )

    def seconds() -> float:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and "evaluate" in done.stdout
        return time.monotonic() - began

    # Any of a few, since other tests may have the machine.
    assert any(seconds() < 0.5 for _ in range(5))


@pytest.mark.parametrize("verb", ["train", "evaluate", "status", "inspect", "scale", "stop"])
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([verb, "--help"])
    assert caught.value.code == 0
    assert "--run NAME" in capsys.readouterr().out


def test_overrides_may_stand_before_and_after_options() -> None:
    verb, arguments = parse(["train", "a.toml", "x.y=1", "--run", "mine", "z=2", "--resume"])
    assert verb == "train"
    assert arguments.config == "a.toml"
    assert arguments.overrides == ["x.y=1", "z=2"]
    assert (arguments.run, arguments.resume, arguments.local) == ("mine", True, False)


def test_evaluate_takes_several_data_files() -> None:
    _, arguments = parse(["evaluate", "a.toml", "x=1", "--data", "b.json", "c.json", "--json"])
    assert (arguments.config, arguments.data, arguments.json) == ("a.toml", ["b.json", "c.json"], 1)
    assert arguments.overrides == ["x=1"]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["trian"],
        ["train"],
        ["train", "a.toml", "--local", "--address", "x"],
        ["evaluate", "a.toml", "--run", "r", "--adapter", "p"],
        ["status", "--unknown"],
    ],
)
def test_wrong_arguments_end_with_usage(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: amortize" in capsys.readouterr().err


def test_our_own_errors_are_shown_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stop", "--run", "nobody"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("amortize stop: no run 'nobody'") and "Traceback" not in said


def test_a_defect_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("defect")

    monkeypatch.setattr("cluster.commands.stop.the_live_run", broken)
    with pytest.raises(KeyError, match="defect"):
        main(["stop"])


def test_status_lists_runs_and_shows_one_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    assert "no runs here yet" in capsys.readouterr().out
    run = RunDirectory("mine")
    run.path.mkdir(parents=True)
    run.write_state(
        first_state("mine", steps=50).model_copy(
            update={
                "phase": "training",
                "step": 7,
                "desired": {"actors": 2},
                "actual": {"actors": 1},
                "metrics": {"loss/value": 1.25, "reward/correct_fraction": 0.5},
                "message": "actor-1 died; [red]replaced[/red]",
            }
        )
    )
    assert main(["status"]) == 0
    line = capsys.readouterr().out
    assert "mine" in line and "7/50" in line and "actors 1/2" in line
    assert main(["status", "--run", "mine"]) == 0
    full = capsys.readouterr().out
    assert "1.25" in full and "50.0%" in full and "[red]replaced[/red]" in full


@pytest.mark.parametrize(
    ("phase", "desired", "shown", "hidden"),
    [
        ("training", 1, ["actors 0/1", "left", "trajectories/s"], []),
        ("done", 1, ["trajectories/s", "buffer"], ["actors", "left"]),
        ("training", 0, ["left", "loss"], ["actors", "trajectories/s", "buffer"]),  # it imitates
    ],
)
def test_status_shows_only_what_is_true_of_the_run(
    phase: str,
    desired: int,
    shown: list[str],
    hidden: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = RunDirectory("mine")
    run.path.mkdir(parents=True)
    last = {TIME_LEFT_S: 0.0, TRAJECTORIES_PER_S: 2.0, BUFFER_SIZE: 3.0, LOSS: 1.0}
    parts = {"desired": {"actors": desired}, "actual": {"actors": 0}, "metrics": last}
    run.write_state(first_state("mine", steps=5).model_copy(update={"phase": phase, **parts}))
    assert main(["status", "--run", "mine"]) == 0
    said = capsys.readouterr().out
    state = run.state()
    assert state is not None
    for text in (said, plain_line(state)):
        assert all(word in text for word in shown) and not any(word in text for word in hidden)


def test_status_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory("mine")
    run.path.mkdir(parents=True)
    run.write_state(first_state("mine", steps=50))
    main(["status", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert [one["run"] for one in listed["runs"]] == ["mine"]
    main(["status", "--run", "mine", "--json"])
    one = json.loads(capsys.readouterr().out)
    assert one["phase"] == "starting" and one["driver_alive"] is True


def test_a_run_that_is_watched_is_shown_until_it_has_ended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("mine")
    run.path.mkdir(parents=True)
    state = first_state("mine", steps=50)
    run.write_state(state.model_copy(update={"phase": "training", "step": 7}))
    waits: list[float] = []

    def later(seconds: float) -> None:
        waits.append(seconds)
        phase = "training" if len(waits) < 3 else "done"
        run.write_state(state.model_copy(update={"phase": phase, "step": 7 + len(waits)}))

    # The module's own name for it: threads of other tests sleep by the library's.
    monkeypatch.setattr("cluster.commands.status.time", SimpleNamespace(sleep=later))
    assert main(["status", "--run", "mine", "--watch"]) == 0
    assert waits == [1.0, 1.0, 1.0]
    assert "10 of 50" in capsys.readouterr().out

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.commands.status.time", SimpleNamespace(sleep=interrupted))
    assert main(["status", "--watch"]) == 0
    assert "10/50" in capsys.readouterr().out


def test_a_verb_that_is_mistyped_is_told_its_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "there is no verb 'trian'; did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("ev", ["evaluate"]),
        ("train --re", ["--resume"]),
        ("scale --", ["--run", "--actors", "--reward-replicas", "--help"]),
        ("stop --run fi", ["first", "fifth"]),
        ("mstep --of s", ["second"]),
        ("train tas", []),  # bash itself completes names of files
    ],
)
def test_a_shell_completes_verbs_options_and_runs(
    typed: str, completed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second", "fifth"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert main(["completion"]) == 0
    words = f"amortize {typed}".split(" ")
    ask = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _amortize"
    shell = f'{capsys.readouterr().out}\n{ask}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == sorted(completed) and not done.stderr


def test_train_refuses_a_bad_configuration_before_it_makes_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "bad.toml"
    config.write_text("[lerner]\nsteps = 1\n")
    assert main(["train", str(config)]) == 1
    said = capsys.readouterr().err
    assert f"{config}:1: lerner: unknown key; did you mean learner?" in said
    assert not (tmp_path / "runs").exists()


def test_a_mistake_in_the_words_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """Each as a user makes it; what is told of it names the remedy."""
    good = ROOT / "tasks/toy.toml"
    (tmp_path / "bad.toml").write_text("[lerner]\nsteps = 1\n")
    (tmp_path / "runs/first").mkdir(parents=True)
    lacking = [str(ROOT / "tasks/infilling.toml"), "task.stories=a.csv", "task.tests=['b', 'c']"]
    asked = [str(ROOT / "tasks/questions.toml")]
    cases = {
        ("train", "bad.toml"): "did you mean learner?",
        ("plan", "none.toml"): "no such file",
        ("train", str(good), "--run", "first"): "add --resume",
        ("evaluate", str(good), "--run", "frist"): "did you mean first?",
        ("export", "--run", "none", "--to", "x"): "it has: first",
        ("mstep", "--of", "fist"): "did you mean first?",
        ("train", *lacking): 'task.stories = "a.csv": no such file',
        ("compare", *lacking): 'task.tests = "c": no such file',
        ("train", *asked, "task.question=q"): "name yours in task.question (so in all 2",
        ("plan", *asked, "task.x={q}"): ":1: task.x names the column 'q', in which it has no text",
        ("train", *asked, "task.data=bad.toml"): "bad.toml: not JSON",
    }
    code = (
        "import sys\nfrom cluster.__main__ import main\n"
        f"for words in {list(cases)}:\n"
        "    assert main(words) == 1\n"
        "assert not {'torch', 'ray', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for expected in cases.values():
        assert expected in done.stderr

"""A run that goes on is the run that was begun, and a refusal changes nothing."""

import json
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.config.file import load_config, resolved_toml
from cluster.config.project import UserError
from cluster.run.directory import RunDirectory, first_state
from cluster.run.identity import check_same_run, identity_of_run, keep_identity
from cluster.run.preflight import check_model_and_data

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = str(ROOT / "tasks/random_number.toml")
SUMS = str(ROOT / "tasks/arithmetic.toml")


def begun(path: str, folder: Path, *overrides: str, older: bool = False) -> RunDirectory:
    """A run that was stopped; `older`: by a version that kept no identity."""
    config = load_config(path, overrides)
    directory = RunDirectory("r", root=folder / "runs")
    directory.path.mkdir(parents=True)
    directory.config_file.write_text(resolved_toml(config))
    if not older:
        keep_identity(directory, identity_of_run(config, check_model_and_data(config)))
    directory.write_state(first_state("r", steps=9).model_copy(update={"phase": "stopped"}))
    return directory


def contents(directory: RunDirectory) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in directory.path.rglob("*") if p.is_file()}


class Refusal:
    """Asks for a run to go on, which it must not; what is said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def of(self, directory: RunDirectory, path: str, *overrides: str) -> str:
        self._monkeypatch.chdir(directory.path.parent.parent)
        before = contents(directory)
        assert main(["train", path, *overrides, "--run", "r", "--resume", "--local"]) == 1
        assert contents(directory) == before
        return self._capsys.readouterr().err


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(monkeypatch, capsys)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task.penalty_nats=3.0", "was begun with task.penalty_nats = 8.0, and 3.0 is asked"),
        ("task.question=Pick one:", "was begun with task.question = "),
        ("task.high=50", "task.high = 100, and 50"),
        ("lm.dtype=bfloat16", ""),
    ],
)
def test_another_reward_is_another_run(
    override: str, said: str, older: bool, tmp_path: Path, refusal: Refusal
) -> None:
    directory = begun(NUMBERS, tmp_path, older=older)
    told = refusal.of(directory, NUMBERS, override)
    assert said in told and "or begin another run" in told


def test_other_data_base_or_adapter_is_another_run(tmp_path: Path, refusal: Refusal) -> None:
    data = tmp_path / "questions.json"
    data.write_bytes((ROOT / "tasks/data/arithmetic/questions.json").read_bytes())
    same = [f"task.questions={data}"]
    directory = begun(SUMS, tmp_path, *same)
    more = refusal.of(directory, SUMS, *same, "task.reward_demonstrations=2")
    assert "task.reward_demonstrations = 0, and 2" in more
    assert "with lora = " in refusal.of(directory, SUMS, *same, "lora.rank=4")
    questions = json.loads(data.read_text())
    data.write_text(json.dumps(questions[1:]))
    assert "task.questions = digest sha256:" in refusal.of(directory, SUMS, *same)


def test_a_run_from_before_a_key_goes_on_while_the_key_adds_nothing(tmp_path: Path) -> None:
    labels = str(ROOT / "tasks/subjectivity.toml")
    directory = RunDirectory("r", root=tmp_path)
    directory.path.mkdir(parents=True)
    now = identity_of_run(load_config(labels, ["task.hinted_draws=4"]), {})
    priced = identity_of_run(load_config(labels, ["task.wrong_label_penalty=50"]), {})
    keep_identity(directory, now | {"task.wrong_label_penalty": 0.0, "task.hinted_draws": 0})
    check_same_run(directory, now, {})
    check_same_run(directory, now | {"base": "of a driver that has its weights"}, {})
    assert not {"task.hinted_draws", "task.wrong_label_penalty"} & set(now)
    with pytest.raises(UserError, match=r"task\.wrong_label_penalty = 0.0, and 50\.0 is asked"):
        check_same_run(directory, priced, {})


def test_a_verifier_that_was_edited_makes_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "my_checks.py"
    verifier = '{kind="verifier", check="my_checks:good"}'
    config = load_config(
        str(ROOT / "tasks/toy.toml"), [f'reward.terms=[{{kind="likelihood"}}, {verifier}]']
    )
    module.write_text("good = lambda text, record: 1.0\n")
    directory, older = (RunDirectory(name, root=tmp_path) for name in ("r", "older"))
    for each in (directory, older):
        each.path.mkdir(parents=True)
    begun_with = identity_of_run(config, {})
    keep_identity(directory, begun_with)
    keep_identity(older, {k: v for k, v in begun_with.items() if "my_checks" not in k})
    check_same_run(directory, identity_of_run(config, {}), {})
    module.write_text("good = lambda text, record: 0.0\n")
    edited = identity_of_run(config, {})
    check_same_run(older, edited, {})  # which kept none
    with pytest.raises(UserError, match=r"my_checks:good \(its source\) = digest sha256"):
        check_same_run(directory, edited, {})


def test_whatever_of_a_package_was_edited_makes_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "checks_of_mine"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("from checks_of_mine.inner import good\n")
    (package / "inner.py").write_text("good = lambda text, record: 1.0\n")
    for name in ("checks_of_mine:good", "checks_of_mine.inner:good"):
        terms = f'[{{kind="likelihood"}}, {{kind="verifier", check="{name}"}}]'
        config = load_config(str(ROOT / "tasks/toy.toml"), [f"reward.terms={terms}"])
        directory = RunDirectory(name.replace(":", "-"), root=tmp_path)
        directory.path.mkdir(parents=True)
        keep_identity(directory, identity_of_run(config, {}))
        (package / "__pycache__").mkdir(exist_ok=True)
        (package / "__pycache__/inner.pyc").write_bytes(name.encode())
        check_same_run(directory, identity_of_run(config, {}), {})
        (package / "inner.py").write_text(f"good = lambda text, record: 0.0  # {name}\n")
        with pytest.raises(UserError, match=r"checks_of_mine.* \(its source\) = digest sha256"):
            check_same_run(directory, identity_of_run(config, {}), {})


def test_what_decides_no_reward_may_change_and_data_may_move(tmp_path: Path) -> None:
    data = tmp_path / "moved.json"
    data.write_bytes((ROOT / "tasks/data/arithmetic/questions.json").read_bytes())
    config = load_config(SUMS)
    other = load_config(
        SUMS,
        [f"task.questions={data}", "task.tests=[]", "task.question_weight=0.5", "reward.ranks=2",
         "learner.learning_rate=1e-4", "learner.reward_temperature.end=0.5", "cluster.actors=4"],
    )  # fmt: skip
    assert identity_of_run(config, {}) == identity_of_run(other, {})

"""Configuration files: what they mean, and how mistakes in them are told."""

from pathlib import Path

import pytest

from cluster.config.file import load_config, parse_overrides, resolved_toml
from cluster.config.project import UserError, locate, told
from cluster.config.reference import reference
from cluster.config.schema import RunConfig
from cluster.config.validation import ConfigError, keys
from tasks.config import ArithmeticConfig

ROOT = Path(__file__).resolve().parent.parent

PLAIN = """\
[task]
name = "arithmetic"
demonstrations = "d.json"
questions = "q.json"
tests = ["t.json"]

[lm]
model = "some/model"

[learner]
steps = 10
groups_per_step = 4
learning_rate = 1e-3
"""


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.toml"
    path.write_text(PLAIN)
    return path


def mistakes(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), overrides)
    return str(caught.value)


def test_defaults_fill_what_the_file_leaves_out(plain: Path) -> None:
    config = load_config(str(plain))
    assert config.learner.steps == 10
    assert config.actors.on_policy_share == pytest.approx(1 / 3)
    assert (config.actors.temperature_low, config.actors.temperature_high) == (0.5, 2.0)


def test_overrides_are_toml_values_and_later_ones_win(plain: Path) -> None:
    config = load_config(
        str(plain),
        [
            "learner.steps=20",
            "learner.steps = 30",
            "learner.learning_rate=1",
            "learner.reward_temperature.end=0.5",
            'lora.targets=["q_proj", "v_proj"]',
            "cluster.dashboard=true",
            "cluster.reward_placement={cpus = 2.0, threads = 3}",
            "lm.model=another-model",
            'buffer.password_file="s=3"',
        ],
    )
    assert config.learner.steps == 30
    assert config.learner.learning_rate == 1.0
    assert config.learner.reward_temperature.end == 0.5
    assert config.lora.targets == ("q_proj", "v_proj")
    assert config.cluster.dashboard is True
    assert config.cluster.reward_placement.threads == 3
    assert config.lm.model == "another-model"
    assert config.buffer.password_file == "s=3"


def test_all_mistakes_are_told_at_once_with_file_line_key_and_value(plain: Path) -> None:
    plain.write_text(PLAIN.replace("steps = 10", 'steps = "ten"').replace("model =", "modle ="))
    told = mistakes(plain)
    assert f'{plain}:11: learner.steps = "ten": must be a whole number' in told
    assert f"{plain}:8: lm.modle: unknown key; did you mean lm.model?" in told
    assert "lm.model: missing" in told
    assert told.endswith("3 mistakes")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.stepz=1", "unknown key; did you mean learner.steps?"),
        ("learner.group_size=6", "did you mean actors.group_size?"),
        ("leaner.steps=6", "unknown key; did you mean learner?"),
        ("learner.steps=1.5", "learner.steps = 1.5: must be a whole number"),
        ("learner.steps=true", "learner.steps = true: must be a whole number"),
        ('learner.steps="7"', 'learner.steps = "7": must be a whole number'),
        ("learner.steps=0", "must be above 0"),
        ("cluster.dashboard=1", "cluster.dashboard = 1: must be true or false"),
        ("lm.dtype=float16", "'float32' or 'bfloat16'"),
        ("lora.targets=[1]", "lora.targets"),
        ("actors.temperature_low=9.0", "must not exceed temperature_high (2.0)"),
        ("buffer.port=6379", "port 6379 is Ray's"),
        ("seed.deep=1", "unknown"),
        ("seed=[1]", "seed = [1]: must be a whole number"),
    ],
)
def test_a_wrong_override_is_told_as_such(plain: Path, override: str, expected: str) -> None:
    if override == "seed.deep=1":
        plain.write_text(f"seed = 1\n{PLAIN}")
        expected = "seed is a value and has no keys"
    told = mistakes(plain, override)
    assert told.startswith("command line: ")
    assert expected in told


@pytest.mark.parametrize("text", ["learner.steps", "=3", ".steps=3", "learner.=3"])
def test_what_is_no_override_is_refused(plain: Path, text: str) -> None:
    assert "write section.key=value" in mistakes(plain, text)


def test_a_missing_file_and_bad_toml_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert f"{missing}: no such file" in mistakes(missing)
    broken = tmp_path / "broken.toml"
    broken.write_text("[lm\n")
    assert "line 1" in mistakes(broken)


def test_the_resolved_configuration_reads_back_as_itself(plain: Path, tmp_path: Path) -> None:
    config = load_config(str(plain), ["lora.targets=['a\"b', 'é']", "cluster.address='x:1'"])
    written = tmp_path / "resolved.toml"
    written.write_text(resolved_toml(config), encoding="utf-8")
    assert load_config(str(written)) == config


@pytest.mark.parametrize(
    "override",
    [
        "buffer.password=hunter2",
        "buffer.password=123456",
        "buffer.pasword=hunter2",
        "bufer.password=hunter2",
        "password=hunter2",
        "buffer=hunter2",
        "buffer={password = 'hunter2'}",
        "buffer.passwordhunter2",
        "hunter2",
        "buffer.url=redis://:hunter2@host:1/0",
        "buffer.url=redis://me:hunter2@host:1/0",
        "buffer.url=redis://me:hun@ter2@host:1/0",
        "buffer.url=redis://host:1/0?password=hunter2",
        "buffer.url=['hunter2']",
        "buffer.port=hunter2",
        "buffer.transport=hunter2",
        "buffer.bind=0.0.0.0",
    ],
)
def test_no_value_of_the_buffer_is_ever_repeated(plain: Path, override: str) -> None:
    told = mistakes(plain, override)
    assert told.startswith("command line")
    for secret in ("hunter2", "123456", "ter2", "0.0.0.0"):
        assert secret not in told
    section, _, value = override.partition("=")
    if section == "buffer.password" or "@" in value or "?" in value:
        assert "AMORTIZE_REDIS_PASSWORD" in told and "buffer.password_file" in told
    # The same in the file.
    if value and "." in section:
        table, _, key = section.partition(".")
        text = value if value[0] in "[{" or value.isdecimal() else f"'{value}'"
        plain.write_text(f"{PLAIN}[{table}]\n{key} = {text}\n")
        in_file = mistakes(plain)
        assert str(plain) in in_file and "hunter2" not in in_file and "123456" not in in_file


def test_files_are_found_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("tasks/config.py").is_file()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "config.py").write_text("")
    assert locate("tasks/config.py").resolve() == tmp_path / "tasks" / "config.py"


def test_every_path_that_exists_is_absolute_from_then_on(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "model").mkdir(parents=True)
    (here / "arithmetic").mkdir()
    for name in ("d.json", "my data.json", "t.json", "secret"):
        (here / name).write_text("[]")
    monkeypatch.chdir(here)
    told = ["lm.model=model", "task.questions=my data.json", "buffer.password_file=secret"]
    config = load_config(str(plain), told)
    assert isinstance(config.task, ArithmeticConfig)
    assert config.lm.model == str(here / "model")
    assert config.task.demonstrations == str(here / "d.json")
    assert config.task.questions == str(here / "my data.json")
    assert config.task.tests == (str(here / "t.json"),)
    assert config.task.name == "arithmetic"
    assert config.buffer.password_file == str(here / "secret")
    policy = load_config(str(plain), ["em.policy=model"]).em.policy
    assert policy == str(here / "model")
    elsewhere = load_config(
        str(plain), ["lm.model=org/name", "task.questions=tasks/config.py", "task.tests=[]"]
    )
    assert isinstance(elsewhere.task, ArithmeticConfig)
    assert elsewhere.lm.model == "org/name"
    assert Path(elsewhere.task.questions).is_absolute()
    number = ["task.question=model", "task.high=9"]
    random = load_config("tasks/random_number.toml", number).task
    assert random.model_dump()["question"] == "model"  # a word, and by chance a folder here
    long = load_config("tasks/random_number.toml", [f"task.question={'why ' * 200}"]).task
    assert len(str(long.model_dump()["question"])) > 700


@pytest.mark.parametrize(
    "key", ["seed", "learner.steps", "evaluation.seed", "posterior.iwae_sizes"]
)
def test_a_whole_number_has_64_bits(plain: Path, key: str) -> None:
    number = f"[{2**64}]" if key.endswith("sizes") else 2**64
    told = mistakes(plain, f"{key}={number}")
    assert told == f"command line: {key}: a whole number has at most 64 bits, as in TOML"
    assert load_config(str(plain), [f"seed={2**63 - 1}"]).seed == 2**63 - 1


def test_a_byte_order_mark_is_no_mistake(plain: Path) -> None:
    plain.write_text(PLAIN, encoding="utf-8-sig")
    assert load_config(str(plain)).learner.steps == 10


def test_an_address_of_another_kind_is_refused(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(UserError, match="write host:port, ray://host:port or auto"):
        load_config(str(plain)).cluster.ray_address()
    assert load_config(str(plain)).cluster.ray_address("ray://h:1") == "ray://h:1"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/r/x"), "/r/x: Permission denied: choose"),
        (OSError(30, "Read-only file system", b"/r/x"), "/r/x: Read-only file system: choose"),
        (OSError(28, "No space left on device"), "No space left on device: free some space"),
        (FileNotFoundError(2, "No such file or directory", "/r"), "/r: No such file or directory"),
        (OSError("AF_UNIX path too long"), "AF_UNIX path too long: set TMPDIR"),
        (ConfigError("text"), "text"),
        (OSError(5, "Input/output error"), None),
        (ValueError("defect"), None),
        (ConnectionResetError(104, "Connection reset by peer"), None),
    ],
)
def test_what_the_machine_refuses_is_told_in_a_sentence(error: Exception, said: str | None) -> None:
    text = told(error)
    assert text is None if said is None else str(text).startswith(said)


def test_every_key_has_a_description() -> None:
    undescribed = {key.path for key in keys(RunConfig) if not key.description}
    assert undescribed <= {"task.name"}


def test_a_configuration_cannot_be_changed(plain: Path) -> None:
    config: RunConfig = load_config(str(plain))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_the_reference_in_docs_is_up_to_date() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == reference(), "python -m cluster.config.reference > docs/configuration.md"


def test_mistakes_in_a_task_are_told_by_its_own_keys(plain: Path) -> None:
    text = mistakes(plain, "task.question_weigth=1.0")
    assert "task.question_weigth" in text and "did you mean task.question_weight?" in text
    assert "task.arithmetic" not in text
    assert "'random_number', 'subjectivity', 'toy'" in mistakes(plain, "task.name=nothing")
    assert "task.min_len" in mistakes(ROOT / "tasks" / "toy.toml", "task.min_len=-1")


def test_ppo_is_on_policy_or_an_error() -> None:
    with pytest.raises(ConfigError, match=r"replayed_per_group \(2\) to 0 and .* \(0\.333\) to 1"):
        load_config("tasks/arithmetic.toml", ["learner.objective=ppo"])
    own = ["learner.replayed_per_group=0", "actors.on_policy_share=1.0"]
    load_config("tasks/arithmetic.toml", ["learner.objective=ppo", *own])


def test_a_configuration_is_changed_as_a_whole_and_checked(plain: Path) -> None:
    config = load_config(str(plain), ["buffer.capacity=7"])
    other = config.changed({"learner.steps": 5, "actors.group_size": 2, "task.tests": ["u.json"]})
    assert (other.learner.steps, other.actors.group_size, other.task.tests) == (5, 2, ("u.json",))
    assert (config.learner.steps, config.actors.group_size) == (10, 6)
    back = {"learner.steps": 10, "actors.group_size": 6, "task.tests": ("t.json",)}
    assert other.changed(back) == config
    for wrong, said in (
        ({"learner.stepz": 5}, "learner.stepz: unknown key; did you mean learner.steps?"),
        ({"learner.steps": "5"}, 'learner.steps = "5": must be a whole number'),
        ({"seed.deep": 5}, "seed.deep: seed is a value and has no keys"),
        ({"actors.lag_versions": 99}, "actors.lag_versions (99) must not exceed"),
        ({"actors.temperature_low": 9.0}, "must not exceed temperature_high"),
    ):
        with pytest.raises(ConfigError) as caught:
            config.changed(wrong)
        assert said in str(caught.value)
    # What is wrong one by one may be right together.
    assert config.changed({"actors.temperature_high": 9.5, "actors.temperature_low": 9.0})


def test_values_of_a_text_are_changed_as_on_the_command_line(plain: Path) -> None:
    items = ["learner.steps = 3", "lm.model=m", "task.tests=['tasks/toy.toml']", "learner.steps=4"]
    assert load_config(str(plain)).changed(parse_overrides(items)) == load_config(str(plain), items)


def test_the_address_of_ray_is_the_nearest_one(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "c:3")
    configured = load_config(str(plain), ["cluster.address='b:2'"]).cluster
    assert (configured.ray_address("a:1"), configured.ray_address()) == ("a:1", "b:2")
    assert load_config(str(plain)).cluster.ray_address() == "c:3"
    monkeypatch.delenv("RAY_ADDRESS")
    assert load_config(str(plain)).cluster.ray_address() is None

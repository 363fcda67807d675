"""A short run of bench/fuzz.py: what others write is taken or refused, and nothing else happens."""

from pathlib import Path

import pytest

from bench.fuzz import Escaped, Target, accepts, fuzz, targets
from cluster.config.file import load_config, parse_overrides
from cluster.config.validation import ConfigError
from tasks.records import DataError

NAMES = [target.name for target in targets(Path())]


@pytest.mark.parametrize("name", NAMES)
def test_mutated_input_is_accepted_or_refused(name: str, tmp_path: Path) -> None:
    [target] = [target for target in targets(tmp_path) if target.name == name]
    count = 2000 if name == "trajectory" else 500
    row = fuzz(target, count, seed=0)
    accepted, refused = row["accepted"], row["refused"]
    assert isinstance(accepted, int) and isinstance(refused, int)
    assert accepted + refused == count
    assert accepted > 0 < refused, "mutations are neither all harmless nor all fatal"


def test_any_other_error_and_a_hang_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(_data: bytes) -> None:
        while True:
            pass

    monkeypatch.setattr("bench.fuzz.HANG_S", 0.1)
    for read, words in ((hang, "longer than"), (lambda data: data[5], "IndexError")):
        with pytest.raises(Escaped, match=words):
            accepts(Target("t", read, lambda rng: b"", DataError), b"")


@pytest.mark.parametrize(
    "text",
    [
        "seed = " + "[" * 5000,
        "a." * 2000 + "b = 1",
        "seed = " + "9" * 5000,
        'task.name = "toy"\nlm.model = "~nobody/' + "m" * 300 + '"\nx = 1',
    ],
)
def test_a_configuration_that_breaks_parsers_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.toml"):
        load_config(str(path))


def test_a_configuration_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config("m" * 300 + "/run.toml")


def test_an_override_that_breaks_the_parser_is_a_text() -> None:
    deep, long = "[" * 5000, "9" * 5000
    assert parse_overrides([f"a.b={deep}", f"a.c={long}"]) == {"a.b": deep, "a.c": long}

"""`amortize posterior` as a person and a program meet it."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.prompts import Prompt
from cluster.__main__ import main
from cluster.cli import parse
from cluster.commands.evaluate import as_learned
from cluster.commands.posterior import of_task
from cluster.config.file import load_config, resolved_toml
from cluster.config.project import PROJECT_ROOT
from cluster.run.assembly import load_task
from cluster.run.directory import RunDirectory
from lm.adapter import load_adapter, save_adapter
from lm.model import CausalLM, attach_adapter, load_base
from lm.scoring import completion_log_probs
from tests.naive_rewards import naive_log_rewards

TOY = "tasks/toy.toml"
SMALL = ("task.max_len=3", "posterior.prompts=2", "posterior.samples=400", "posterior.draws=400")
FIGURES = ("tv", "kl_q_p", "kl_p_q", "jsd", "log_z_error", "valid")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    torch.set_num_threads(1)


def reported(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The one JSON object on stdout."""
    capsys.readouterr()
    assert main(["posterior", *arguments, "--json"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert printed.count("\n") == 1
    return dict(found)


def make_run(name: str, *overrides: str) -> Path:
    """A run that left its configuration and an adapter, far from the identity."""
    config = load_config(TOY, overrides)
    base = load_base(config.lm)
    model = attach_adapter(base, config.lora, seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(0.0, 0.08, generator=generator)
    folder = RunDirectory(name).adapter
    save_adapter(model, folder, base.fingerprint)
    RunDirectory(name).config_file.write_text((PROJECT_ROOT / TOY).read_text())
    return folder


def brute_force(model: CausalLM, prompt: Prompt, temperature: float) -> dict[str, float]:
    """Of the toy of at most three letters, each completion and each reward by itself."""
    base, task = load_task(load_config(TOY, SMALL))
    legal = task.actions.legal_tokens or ()
    strings = [z for length in range(4) for z in itertools.product(legal, repeat=length)]
    with torch.no_grad():
        scored = completion_log_probs(
            model,
            task.actions,
            [prompt.prompt] * len(strings),
            strings,
            [[False] * len(z) for z in strings],
        )
    last = [len(z) for z in strings]
    log_q = (scored.log_pf_BT.sum(1) + scored.log_stop_BS[range(len(last)), last]).double().numpy()
    items = [task.reward_query.item(prompt, z, np.array([len(z)], dtype=np.int32)) for z in strings]
    log_weight = np.concatenate(naive_log_rewards(base.model, items)) / temperature
    log_z = float(np.logaddexp.reduce(log_weight.astype(np.float64)))
    log_p = log_weight - log_z
    q, p, m = np.exp(log_q), np.exp(log_p), np.log((np.exp(log_q) + np.exp(log_p)) / 2)
    return {
        "tv": 0.5 * float(np.abs(q - p).sum()),
        "kl_q_p": float((q * (log_q - log_p)).sum()),
        "kl_p_q": float((p * (log_p - log_q)).sum()),
        "jsd": 0.5 * float((q * (log_q - m)).sum() + (p * (log_p - m)).sum()),
        "log_z": log_z,
    }


def test_overrides_may_stand_before_and_after_options() -> None:
    verb, arguments = parse(["posterior", "a.toml", "x.y=1", "--run", "mine", "z=2", "--json"])
    assert (verb, arguments.config, arguments.run, arguments.json) == (
        "posterior",
        "a.toml",
        "mine",
        True,
    )
    assert arguments.overrides == ["x.y=1", "z=2"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_figures_of_base_and_run_equal_brute_force(
    capsys: pytest.CaptureFixture[str], temperature: float
) -> None:
    folder = make_run("mine")
    heat = f"learner.reward_temperature.end={temperature}"
    found = reported(capsys, TOY, "--run", "mine", *SMALL, heat, "posterior.tolerance=0")
    base, task = load_task(load_config(TOY, SMALL))
    adapted = load_adapter(load_base(load_config(TOY).lm), folder)
    assert (found["run"], found["temperature"], found["left_out"]) == ("mine", temperature, 0.0)
    assert len(found["prompts"]) == 2
    for prompt, report in zip(task.prompts, found["prompts"], strict=False):
        assert report["enumerable"] and report["completions"] == 85
        for model, figures in ((adapted, report), (base.model, report["base"])):
            expected = brute_force(model, prompt, temperature)
            assert report["log_z"] == pytest.approx(expected.pop("log_z"), abs=1e-4)
            assert {key: figures[key] for key in expected} == pytest.approx(expected, abs=1e-4)
            assert figures["valid"] == pytest.approx(1.0, abs=1e-6)
            error = abs(figures["log_z_estimate"] - report["log_z"])
            assert figures["log_z_error"] == pytest.approx(error)
    for key in FIGURES:
        ours = [prompt[key] for prompt in found["prompts"]]
        theirs = [prompt["base"][key] for prompt in found["prompts"]]
        assert found[key] == pytest.approx(np.mean(ours))
        assert found["base"][key] == pytest.approx(np.mean(theirs))
    assert abs(found["tv"] - found["base"]["tv"]) > 0.01
    assert RunDirectory("mine").plots.joinpath("posterior.png").read_bytes()[:4] == b"\x89PNG"


def test_without_a_run_the_base_stands_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    found = reported(capsys, TOY, *SMALL)
    assert found["run"] is None
    assert {key: found[key] for key in FIGURES} == {key: found["base"][key] for key in FIGURES}
    assert found["base"]["prompts"] == found["base"]["enumerated"] == 2
    assert found["left_out"] <= 1e-3
    assert Path("posterior-toy.png").read_bytes()[:4] == b"\x89PNG"


def test_bounds_hold_the_exact_values(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("mine")
    many = ("posterior.samples=1000", "posterior.draws=6000")
    found = reported(capsys, TOY, "--run", "mine", *SMALL, *many)
    for prompt in found["prompts"]:
        log_z = prompt["log_z"]
        for policy in (prompt, prompt["base"]):
            elbo, eubo = log_z - policy["kl_q_p"], log_z + policy["kl_p_q"]
            for name, exact in (("elbo", elbo), ("log_z", log_z), ("eubo", eubo)):
                bound = policy["bounds"][name]
                # Twice the 95 % interval, or one run in a few would fail for nothing.
                assert abs(bound["value"] - exact) < bound["high"] - bound["low"], name
    elbos = [prompt["bounds"]["elbo"]["value"] for prompt in found["prompts"]]
    assert found["bounds"]["elbo"] == pytest.approx(np.mean(elbos))
    assert set(found["bounds"]["iwae"]) == {"8", "64"}


def test_a_prompt_that_cannot_be_enumerated_has_bounds_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = reported(capsys, TOY, *SMALL, "posterior.max_nodes=10")
    assert all(found[key] is None and found["base"][key] is None for key in FIGURES)
    assert found["left_out"] > 0.1
    for prompt in found["prompts"]:
        assert not prompt["enumerable"] and prompt["log_z"] is None and prompt["nodes"] <= 10
        assert prompt["oversampled"] == []
        assert prompt["bounds"]["elbo"]["value"] < prompt["bounds"]["log_z"]["high"]
    assert not Path("posterior-toy.png").exists()


def test_only_what_is_enumerated_enters_the_means(capsys: pytest.CaptureFixture[str]) -> None:
    # The fourth prompt alone needs more than a thousand prefixes.
    few = ("posterior.samples=20", "posterior.draws=0", "posterior.max_nodes=1000")
    found = reported(capsys, TOY, *few, "posterior.tolerance=0.2")
    *others, last = found["prompts"]
    assert not last["enumerable"] and all(prompt["enumerable"] for prompt in others)
    assert (found["base"]["prompts"], found["base"]["enumerated"]) == (4, 3)
    assert found["tv"] == pytest.approx(np.mean([prompt["tv"] for prompt in others]))
    assert found["left_out"] == max(last["left_out_q"], last["left_out_p"]) > 0.2
    assert all(prompt["left_out_p"] > 0 for prompt in others)


def test_the_strings_most_amiss_are_told_with_their_probabilities(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for prompt in reported(capsys, TOY, *SMALL)["prompts"]:
        over, under = prompt["oversampled"], prompt["undersampled"]
        assert len(over) == len(under) == 5
        assert all(one["q"] > one["p"] for one in over)
        assert all(one["p"] > one["q"] for one in under)
        gaps = [one["q"] - one["p"] for one in over]
        assert gaps == sorted(gaps, reverse=True)
        # No other string is further off than these.
        assert prompt["tv"] >= max(sum(gaps), sum(one["p"] - one["q"] for one in under)) - 1e-6


def test_a_tasks_own_reward_is_enumerated_up_to_its_bound(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = reported(capsys, "tasks/random_number.toml", "posterior.tolerance=0.05")
    [prompt] = found["prompts"]
    assert prompt["log_z"] == pytest.approx(math.log(101), abs=1e-2)
    assert prompt["left_out_p"] < 1e-2
    assert 0.2 < found["valid"] < 1.0
    assert found["bounds"]["eubo"] is None
    assert Path("posterior-random_number.png").exists()


def test_the_terminal_shows_figures_and_where_the_plot_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("mine")
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["posterior", TOY, "--run", "mine", *SMALL]) == 0
    said, progress = capsys.readouterr()
    interval = r" +-?\d+\.\d{3} \[-?\d+\.\d{3}, -?\d+\.\d{3}\]"  # in one line, of both policies
    assert re.search(rf"^ ELBO {interval}{interval} *$", said, re.MULTILINE)
    assert "loading the language model" in progress
    assert "T = 1" in said and "exact, by enumeration" in said and "bounds of log Z" in said
    assert "2 of 2" in said and "sampled too often" in said
    plot = RunDirectory("mine").plots / "posterior.png"
    assert f"plot: {plot}" in said and plot.exists()
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["posterior", TOY, *SMALL, "posterior.max_nodes=0"]) == 0
    said = capsys.readouterr().out
    assert "not enumerable" in said and "no prompt could be enumerated" in said
    assert main(["posterior", TOY, *SMALL, "posterior.draws=1", "posterior.max_nodes=0"]) == 0
    said = capsys.readouterr().out
    assert "none of 1 fits" in said and "0 samples: too few" in said


@pytest.mark.parametrize(("words", "seed"), [([], 7), (["seed=9"], 9)])
def test_a_run_is_measured_on_the_data_that_its_seed_drew(words: list[str], seed: int) -> None:
    run = RunDirectory("mine")
    run.path.mkdir(parents=True)
    run.config_file.write_text(resolved_toml(load_config(TOY, ["seed=7"])))
    config = load_config(TOY, words)
    assert of_task(run, config, words).seed == seed
    assert as_learned(config, words, run).seed == seed


@pytest.mark.parametrize(
    ("words", "model", "dtype"),
    [
        ([], "org/its-base", "bfloat16"),
        (["lm.model=org/moved"], "org/moved", "bfloat16"),
        (["lm.dtype=float32"], "org/its-base", "float32"),
        (["lm={model='org/moved'}"], "org/moved", "float32"),
    ],
)
def test_a_run_is_measured_on_its_own_base(words: list[str], model: str, dtype: str) -> None:
    run = RunDirectory("mine")
    run.path.mkdir(parents=True)
    own = load_config(TOY, ["lm.model=org/its-base", "lm.dtype=bfloat16"])
    run.config_file.write_text(resolved_toml(own))
    config = load_config(TOY, words)
    for found in (of_task(run, config, words), as_learned(config, words, run)):
        assert (found.lm.model, found.lm.dtype) == (model, dtype)


def test_a_run_of_another_machine_is_measured_here(tmp_path: Path) -> None:
    run = RunDirectory("mine")
    run.path.mkdir(parents=True)
    there = ["lm.dtype=bfloat16", "lm.device=cuda"]
    config = load_config(TOY, ["lm.device=cpu"])
    for model, expected in ((tmp_path, str(tmp_path)), (tmp_path / "gone", config.lm.model)):
        own = load_config(TOY, [*there, f"lm.model={model}"])
        run.config_file.write_text(resolved_toml(own))
        for found in (of_task(run, config, []), as_learned(config, [], run)):
            assert (found.lm.model, found.lm.device) == (expected, "cpu")
            assert found.lm.dtype == "bfloat16"


def test_a_run_of_another_task_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("mine")
    assert main(["posterior", "tasks/random_number.toml", "--run", "mine"]) == 1
    assert "run 'mine' is of task 'toy', the configuration of 'random_number'" in (
        capsys.readouterr().err
    )


def test_an_adapter_of_another_base_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run("mine")
    (folder / "base_fingerprint.txt").write_text("0000\n")
    assert main(["posterior", TOY, "--run", "mine", *SMALL]) == 1
    assert "was trained on base 0000" in capsys.readouterr().err
    assert main(["posterior", TOY, "--run", "yours", *SMALL]) == 1
    assert "no run 'yours'" in capsys.readouterr().err

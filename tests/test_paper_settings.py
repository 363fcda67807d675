"""The paper's settings: they load, and they run on small models of the paper's architectures."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.__main__ import main
from cluster.config.file import load_config
from cluster.config.project import PROJECT_ROOT, UserError
from cluster.experiments.methods import EM, em_method_steps, method_config
from cluster.run.directory import RunDirectory
from cluster.run.preflight import check_before_start
from lm.config import LMConfig
from lm.hub import ModelNotFound
from lm.model import load_base
from reward.packed import suffix_log_rewards
from tasks.registry import build_task
from tests.naive_rewards import naive_log_rewards
from tests.paper_models import END_OF_TEXT, POSITIONS, save_model

# Task -> the architecture of the paper's model.
PAPER = {
    "random_number": "gptj",
    "continuation": "gpt2",
    "infilling": "gpt2",
    "subjectivity": "gptj",
    "arithmetic": "gptj",
}
OTHER = {"gptj": "gpt2", "gpt2": "gptj"}
SMALL = (
    *("lora.rank=4", "actors.groups_per_batch=2", "actors.group_size=4", "actors.max_rows=8"),
    *("learner.groups_per_step=2", "learner.steps=2", "learner.warmup_steps=0"),
    *("evaluation.max_items=2", "evaluation.samples=2", "evaluation.diversity_items=1"),
    *("posterior.prompts=1", "posterior.samples=10", "posterior.max_nodes=20"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("paper")
    for architecture in ("gpt2", "gptj", "bert"):
        save_model(architecture, made / architecture)
    # All of them go through such a tokenizer where the shipped settings run on another model.
    stories = PROJECT_ROOT / "tasks/data/infilling/train.jsonl"
    first = stories.read_text(encoding="utf-8").splitlines(keepends=True)[:100]
    (made / "stories.jsonl").write_text("".join(first), encoding="utf-8")
    return made


def overrides(task: str, folder: Path) -> list[str]:
    own = {
        "continuation": [f"task.embedder={folder / 'bert'}"],
        "infilling": [
            f"task.embedder={folder / 'bert'}",
            f"task.stories={folder / 'stories.jsonl'}",
            "task.demonstrations=6",
            "task.min_len=3",
        ],
    }
    return [*SMALL, f"lm.model={folder / PAPER[task]}", *own.get(task, [])]


def test_the_models_have_the_quirks_that_the_papers_have(folder: Path) -> None:
    gpt2, gptj = (AutoModelForCausalLM.from_pretrained(folder / one) for one in ("gpt2", "gptj"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "gpt2")
    assert tokenizer.pad_token is None and tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.decode(tokenizer.encode(" the boat")[:1]) == " the"
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    assert gptj.lm_head.bias is not None and gptj.config.vocab_size > len(tokenizer)


@pytest.mark.parametrize("task", PAPER)
def test_the_papers_settings_run(
    task: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    path = f"tasks/paper/{task}.toml"
    assert main(["train", path, *overrides(task, folder), "--run", "small", "--local"]) == 0
    rows = [json.loads(line) for line in Path("runs/small/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(torch.tensor(row["loss/value"]).isfinite() for row in rows)
    scores = json.loads(Path("runs/small/scores.json").read_text())
    assert scores["before"] and scores["after"]
    assert ("similarity" not in scores["after"]["metrics"]) == (task != "infilling")


@pytest.mark.parametrize("task", PAPER)
def test_every_method_that_the_papers_settings_compare_can_begin(
    task: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, small = f"tasks/paper/{task}.toml", overrides(task, folder)
    methods = load_config(path, small).compare.methods
    assert {"base", "gflownet"} <= set(methods)
    for title in methods:
        if title == EM:
            [e_step, m_step] = em_method_steps(
                load_config(path, small), seed=0, first="c-gflownet-0", own="c-gflownet_em-0"
            )
            rows = m_step.config.actors.group_size + m_step.config.learner.replayed_per_group
            assert (m_step.config.learner.warmup_steps, rows) == (0, 4 + 32)
            config = e_step.config
        else:
            config = method_config(load_config(path, small), title=title, seed=0)
        check_before_start(config, RunDirectory(title), resume=False, address=None, local=True)


@pytest.mark.parametrize(("task", "architecture"), [(t, OTHER[a]) for t, a in PAPER.items()])
def test_the_shipped_settings_run_on_another_model_by_one_line(
    task: str, architecture: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    model = f"lm.model={folder / architecture}"
    assert main(["train", f"tasks/{task}.toml", model, *SMALL, "--run", "other", "--local"]) == 0
    scores = json.loads(Path("runs/other/scores.json").read_text())
    assert scores["before"] and scores["after"]


@pytest.mark.parametrize("task", ["continuation", "infilling", "arithmetic"])
def test_rewards_of_these_models_are_those_of_naive_passes(task: str, folder: Path) -> None:
    config = load_config(f"tasks/paper/{task}.toml", overrides(task, folder))
    base = load_base(LMConfig(model=config.lm.model))
    built = build_task(config.task, base.tokenizer, seed=config.seed)
    tokens = base.tokenizer.encode(
        " 6 + 0 = 6" if task == "arithmetic" else " The captain looked at the boat"
    )
    built.actions.check(tokens, [False] * len(tokens))
    stops = built.actions.stop_positions(tokens, [False] * len(tokens))
    item = built.reward_query.item(built.prompts[0], tokens, stops)
    [packed_S] = suffix_log_rewards(base.model, [item], 4096)
    [naive_S] = naive_log_rewards(base.model, [item])
    assert packed_S == pytest.approx(naive_S, abs=1e-4)


LONG_WORD = "qxzj" * 400
LONG_STORY = {f"sentence{number}": f"{LONG_WORD} ran." for number in range(1, 6)}
LONG_SUM = {"str_query": f"Question: {' + '.join('9' * 400)} = ? Answer:", "num_sol": 9 * 400}


@pytest.mark.parametrize(
    ("task", "key", "text"),
    [
        ("continuation", "data", f"It rained.\n{LONG_WORD}.\n"),
        ("continuation", "tests", f"It rained.\n{LONG_WORD}.\n"),
        ("infilling", "tests", json.dumps(LONG_STORY)),
        ("subjectivity", "tests", json.dumps({"text": LONG_WORD, "label": 1})),
        ("arithmetic", "tests", json.dumps([LONG_SUM])),
    ],
)
def test_a_prompt_that_outgrows_the_model_is_told_before_anything_starts(
    task: str, key: str, text: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("long.jsonl").write_text(text)
    value = "long.jsonl" if key == "data" else '["long.jsonl"]'
    config = load_config(
        f"tasks/paper/{task}.toml", [*overrides(task, folder), f"task.{key}={value}"]
    )
    with pytest.raises(UserError, match=rf"prompt .*the model has {POSITIONS}"):
        check_before_start(config, RunDirectory("x"), resume=False, address=None, local=True)


@pytest.mark.parametrize("task", ["continuation", "arithmetic"])
def test_what_is_not_measured_need_not_fit(
    task: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = {"str_query": "Question: 1 + 1 = ? Answer:", "num_sol": 2}
    sums = json.dumps([short, short, LONG_SUM])
    Path("long").write_text(sums if task == "arithmetic" else f"It rained.\nHe ran.\n{LONG_WORD}.")
    small = [*overrides(task, folder), "task.tests=['long']"]

    def check(max_items: int) -> None:
        config = load_config(
            f"tasks/paper/{task}.toml", [*small, f"evaluation.max_items={max_items}"]
        )
        check_before_start(config, RunDirectory("x"), resume=False, address=None, local=True)

    check(2)
    with pytest.raises(UserError, match=rf"prompt .*the model has {POSITIONS}"):
        check(3)


def test_a_sentence_encoder_that_is_missing_is_told_before_anything_starts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(
        "tasks/paper/infilling.toml", [*overrides("infilling", folder), "task.embedder=./nowhere"]
    )
    with pytest.raises(ModelNotFound, match="nowhere"):
        check_before_start(config, RunDirectory("x"), resume=False, address=None, local=True)

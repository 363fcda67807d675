"""Held-out data: no split shares an item with another, and choices have data of their own."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from cluster.config.file import PROJECT_ROOT, load_config
from cluster.reports.score_table import table
from cluster.run.evaluation import evaluation_context
from lm.hub import load_tokenizer
from tasks.held_out import HeldOutConfig, NothingToMeasure, Split, read_splits
from tasks.records import DataError
from tasks.registry import build_task
from tasks.sentences.files import load_stories
from tasks.task import Task

# Task -> how many items a validation and a test file hold.
TESTED = {
    "arithmetic": ([100] * 3, [500] * 3),
    "continuation": ([100], [200]),
    "infilling": ([100], [100]),
    "subjectivity": ([200], [300]),
}
SMALL = ("evaluation.max_items=1", "evaluation.samples=1", "evaluation.diversity_items=0")
SPLITS: tuple[Split, Split] = ("validation", "test")


@cache
def task_of(name: str, *overrides: str) -> Task:
    config = load_config(f"tasks/{name}.toml", overrides)
    return build_task(config.task, load_tokenizer(config.lm), seed=config.seed)


def texts(task: Task, split: Split) -> list[str]:
    return [item.prompt.text for file in task.held_out[split] for item in file]


@pytest.mark.parametrize("name", TESTED)
def test_no_shipped_split_shares_an_item_with_another(name: str) -> None:
    task = task_of(name)
    sizes = tuple([len(file) for file in task.held_out[split]] for split in SPLITS)
    assert sizes == TESTED[name]
    trained = {prompt.text for prompt in task.prompts}
    trained |= {demonstration.prompt.text for demonstration in task.demonstrations}
    validated, tested = texts(task, "validation"), texts(task, "test")
    assert len(set(validated)) == len(validated) and len(set(tested)) == len(tested)
    assert not set(validated) & set(tested)
    assert not trained & {*validated, *tested}
    paths = {"tests", "validation"}
    shipped, paper = (
        load_config(f"tasks/{folder}{name}.toml").task.model_dump(include=paths)
        for folder in ("", "paper/")
    )
    assert paper == shipped and len(shipped) == 2


@pytest.mark.parametrize("name", TESTED)
def test_a_policy_is_measured_on_the_split_that_is_asked_for(name: str) -> None:
    context = evaluation_context(load_config(f"tasks/{name}.toml", SMALL), None)
    task = task_of(name)
    metrics = []
    for split in SPLITS:
        settings = context.settings.model_copy(update={"split": split})
        found = task.evaluate(replace(context, settings=settings))
        firsts = [file[0].prompt.text for file in task.held_out[split]]
        for example, text in zip(found.examples, firsts, strict=name != "continuation"):
            assert example.question in text
        metrics.append({name: metric.value for name, metric in found.metrics.items()})
    assert name != "continuation" or metrics[0] != metrics[1]


@pytest.mark.parametrize("name", TESTED)
def test_choices_on_test_data_are_refused_with_a_remedy(name: str) -> None:
    task = task_of(name, "task.validation=[]")
    task.check_evaluation("test")
    with pytest.raises(NothingToMeasure, match=r"name files as task\.validation, or hold a tenth"):
        task.check_evaluation("validation")
    config = load_config(f"tasks/{name}.toml", ["evaluation.split=validation"])
    with pytest.raises(NothingToMeasure):
        task.evaluate(evaluation_context(config, None))


@pytest.mark.parametrize("name", ["toy", "random_number", "two_operands"])
def test_what_is_measured_against_the_posterior_has_nothing_to_hold_out(name: str) -> None:
    task = task_of(name)
    assert not any(task.held_out.values())
    task.check_evaluation("validation")


@pytest.mark.parametrize("name", TESTED)
def test_without_files_a_share_of_the_training_data_is_carved_out(name: str) -> None:
    few = name == "subjectivity"
    whole = task_of(name, "task.labels=50") if few else task_of(name)
    task = task_of(name, "task.validation=[]", "task.validation_share=0.2")
    kept, carved = {prompt.text for prompt in task.prompts}, set(texts(task, "validation"))
    known = {prompt.text for prompt in whole.prompts}
    assert carved and not kept & carved and kept | carved <= known
    assert few or kept | carved == known
    assert not carved & {one.prompt.text for one in task.demonstrations}
    assert 0.1 < len(carved) / len(known) < 0.3
    assert texts(task, "test") == texts(whole, "test")


class Settings(HeldOutConfig):
    """Words in files, for what is said of any of them."""


def load(path: str) -> tuple[str, ...]:
    return tuple(Path(path).read_text().split())


def test_what_is_in_both_splits_is_refused(tmp_path: Path) -> None:
    for name, words in (("v", "a b c"), ("t", "c d b")):
        (tmp_path / name).write_text(words)
    config = Settings(tests=(str(tmp_path / "t"),), validation=(str(tmp_path / "v"),))
    with pytest.raises(DataError, match=r"2 records of task\.validation .* of task\.tests .*'b'"):
        read_splits(config, ["e"], load, str)


def test_what_is_carved_out_depends_on_the_text_alone() -> None:
    words = [f"word {number}" for number in range(2000)]
    config = Settings(validation_share=0.25)
    splits = read_splits(config, words, load, str)
    [carved] = splits.held_out["validation"]
    assert 440 < len(carved) < 560 and [*splits.training] == [w for w in words if w not in carved]
    fewer = read_splits(config, words[::-2], load, str)
    assert set(fewer.held_out["validation"][0]) == set(carved) & set(words[::-2])


def test_the_overlap_of_true_sentences_with_training_is_told() -> None:
    data = PROJECT_ROOT / "tasks/data/infilling"
    stories = {name: load_stories(str(data / f"{name}.jsonl")) for name in ("train", "test")}
    middles = {story.middle for story in stories["train"]}
    met = [story.middle in middles for story in stories["test"]]
    assert sum(met) == 53
    small = ["evaluation.samples=1", "evaluation.max_items=5"]
    found = task_of("infilling").evaluate(
        evaluation_context(load_config("tasks/infilling.toml", small), None)
    )
    assert found.note.startswith(f"{sum(met[:5])} of the 5 true sentences stand word for word in")
    assert 0 < sum(met[:5]) < 5
    assert table(None, found).caption == found.note

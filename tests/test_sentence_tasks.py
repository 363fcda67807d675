"""Infilling and continuation: files, prompts, rewards against naive scoring, metrics by hand."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cluster.config.file import PROJECT_ROOT, load_config
from cluster.reports.score_table import rows
from cluster.run.evaluation import evaluate, evaluation_context
from lm.model import load_base
from reward.packed import suffix_log_rewards
from seed_lm.corpus import Share, documents
from seed_lm.prose_files import write_files
from seed_lm.scenes import Scenes
from seed_lm.stories import Exercises, Stories
from seed_lm.tokenizer import END_OF_TEXT, train_tokenizer
from tasks.config import ContinuationConfig, InfillingConfig
from tasks.evaluation.few_shot import worked_examples
from tasks.records import DataError
from tasks.sentences.continuation import build_continuation
from tasks.sentences.evaluation import write_sentences
from tasks.sentences.files import KEYS, load_prompts, load_stories
from tasks.sentences.infilling import build_infilling
from tasks.sentences.metrics import bleu4, diversity, gleu4, self_bleu4, word_distance
from tasks.task import Task
from tests.naive_rewards import naive_log_rewards
from tests.sentence_toy import sentence_config

PROSE = (Share(Stories(), 1.0), Share(Exercises(), 0.2), Share(Scenes(), 1.0))
DATA = PROJECT_ROOT / "tasks/data"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    raw: RawTokenizer = train_tokenizer(islice(documents(PROSE, "tokenizer"), 2000))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END_OF_TEXT)


def small(ids: Sequence[int] | NDArray[np.int32]) -> NDArray[np.int32]:
    """Token ids as ids of the tiny model's vocabulary."""
    return np.asarray(ids, dtype=np.int32) % 31


def infilling_config(path: str) -> InfillingConfig:
    return InfillingConfig(name="infilling", stories=path, tests=(path,), demonstrations=5)


def test_the_policy_reads_the_ending_and_the_frozen_lm_the_story_as_it_is_told(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = str(DATA / "infilling" / "train.jsonl")
    task, story = build_infilling(infilling_config(path), tokenizer), load_stories(path)[0]
    demonstration = task.demonstrations[0]
    assert len(task.demonstrations) == 5
    assert tokenizer.decode(demonstration.prompt.prompt) == (
        f"Beginning: {story.beginning}\nEnding: {story.ending}\nMiddle:"
    )
    length = len(demonstration.completion)
    item = task.reward_query.item(
        demonstration.prompt, demonstration.completion, np.array([length], dtype=np.int32)
    )
    scored = [*item.context, *item.completion, *item.answer]
    assert scored == tokenizer.encode(story.text)  # the very tokens of the plain story
    assert task.held_out["test"][0][0].middle == story.middle.removesuffix(".")


def test_a_sentence_holds_nothing_that_ends_one(tokenizer: PreTrainedTokenizerFast) -> None:
    task = build_infilling(infilling_config(str(DATA / "infilling" / "train.jsonl")), tokenizer)
    legal = {tokenizer.decode([token]) for token in task.actions.legal_tokens or ()}
    assert " the" in legal and "," in legal
    assert not {".", "!", "?", ":", "\n", END_OF_TEXT} & legal
    assert task.actions.stop_token == tokenizer.encode(".")[0]


@pytest.mark.parametrize("kind", ["infilling", "continuation"])
def test_rewards_are_log_probabilities_of_the_plain_text(
    kind: str,
    tokenizer: PreTrainedTokenizerFast,
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    """On a tiny model, by one pass over each whole text."""
    task: Task
    if kind == "infilling":
        task = build_infilling(infilling_config(str(DATA / "infilling/train.jsonl")), tokenizer)
    else:
        config = ContinuationConfig(name="continuation", data=str(DATA / "continuation/train.txt"))
        task = build_continuation(config, tokenizer)
    model, prompt = tiny_lm("llama").requires_grad_(False), task.prompts[0]
    z = small(tokenizer.encode(" So he swam across"))
    asked = task.reward_query.item(prompt, z, np.arange(len(z) + 1, dtype=np.int32))
    item = replace(asked, context=small(asked.context), answer=small(asked.answer))
    found = suffix_log_rewards(model, [item], 4096)[0]
    assert np.allclose(found, naive_log_rewards(model, [item])[0], atol=1e-4)
    shown = small(prompt.scored_prompt)
    behind = small(prompt.answer if kind == "infilling" else [task.reward_query.stop_token])
    for stop in range(len(z) + 1):
        text = [*shown, *z[:stop], *behind]
        log_p = model(torch.tensor([text])).logits[0].log_softmax(-1)
        expected = sum(log_p[at - 1, text[at]].item() for at in range(len(shown), len(text)))
        assert found[stop] == pytest.approx(expected, abs=1e-3)


def test_every_bad_line_of_stories_is_reported(tmp_path: Path) -> None:
    good = dict.fromkeys(KEYS, "He ran.")
    path = tmp_path / "stories.jsonl"
    bad = [json.dumps(good), "{", json.dumps({**good, "sentence4": " "}), "[1]"]
    path.write_text("\n".join(bad))
    with pytest.raises(DataError) as caught:
        load_stories(str(path))
    said = str(caught.value).split("\n")
    assert [line.split(" ")[0] for line in said] == [f"{path}:{n}:" for n in (2, 3, 4)]
    assert "sentence4" in said[1]


def test_stories_may_come_as_csv_with_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "stories.csv"
    path.write_text(f'storyid,{",".join(KEYS)}\n7,A.,B.,C.,"D, d.",E.\n')
    [story] = load_stories(str(path))
    assert (story.beginning, story.middle, story.ending) == ("A. B. C.", "D, d.", "E.")
    path.write_text(f"storyid,{','.join(KEYS)}\n7,A.,B.,C.,D.\n")
    with pytest.raises(DataError, match=r"stories.csv:2: no text under sentence5"):
        load_stories(str(path))


def test_a_passage_says_itself_what_its_middle_is(tmp_path: Path) -> None:
    path = tmp_path / "passages.jsonl"
    passage = {"beginning": "It rained. ", "middle": "He ran.", "ending": "He fell. He sat."}
    path.write_text(json.dumps(passage) + "\n" + json.dumps({**passage, "source": "web"}))
    story, same = load_stories(str(path))
    assert story == same and story.text == "It rained. He ran. He fell. He sat."
    assert (story.beginning, story.middle) == ("It rained.", "He ran.")
    path.write_text(json.dumps({**passage, "ending": " "}))
    with pytest.raises(DataError, match="no text under ending; a story has beginning and middle a"):
        load_stories(str(path))
    path.write_text(json.dumps({"beginning": "It rained."}))
    with pytest.raises(DataError, match="it must have sentence1, "):
        load_stories(str(path))


def test_an_unquoted_comma_shifts_no_sentence_of_a_story(tmp_path: Path) -> None:
    path = tmp_path / "stories.csv"
    header, good = f"{','.join(KEYS)},title", "A.,B.,C.,D.,E.,T"
    path.write_text("\n".join([header, good, "A.,B, b.,C.,D.,E.,T", good, "A.,B.,C.,D.,E."]) + "\n")
    with pytest.raises(DataError) as caught:
        load_stories(str(path))
    said = str(caught.value).split("\n")
    assert [line.split(" ")[0] for line in said] == [f"{path}:{n}:" for n in (3, 5)]
    assert "names 6 columns, this row has 7; put a text that holds a comma into quotes" in said[0]
    assert "no text under title" in said[1]
    path.write_text(f"\ufeff{header}\n{good}\n\n", encoding="utf-8")
    assert [story.text for story in load_stories(str(path))] == ["A. B. C. D. E."]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('7,A.,B.,C.,D.,"E.', "csv:2: not CSV: field larger than"),  # all that follows
        ('7,A.,B.,C.,"D," he said.,E.', r"csv:2: not CSV: ',' expected after '\"'"),
        ('7,A.,B.,C.,"D.\nD.",E.', r"csv:3: a line break under sentence4"),
    ],
)
def test_a_quote_that_is_left_open_loses_no_story_silently(
    row: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "stories.csv"
    path.write_text("\n".join([f"storyid,{','.join(KEYS)}", row, *["8,A.,B.,C.,D.,E."] * 20_000]))
    with pytest.raises(DataError, match=said):
        load_stories(str(path))


def test_files_of_other_editors_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("It rained.\nHe ran.\n", encoding="utf-8-sig")
    assert load_prompts(str(path)) == ("It rained.", "He ran.")
    story = {**dict.fromkeys(KEYS, "He ran."), "sentence2": "He ran.\u2028He sat."}
    path.write_text(json.dumps(story, ensure_ascii=False) + "\n{")
    with pytest.raises(DataError, match=r"^\S+file:2: not JSON"):
        load_stories(str(path))


def test_every_bad_prompt_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(
        "She questions the timing. \n\nIt rained.\x07\n" + "x" * 2001 + "\nIt rained.\n"
    )
    with pytest.raises(DataError) as caught:
        load_prompts(str(path))
    said = str(caught.value).split("\n")
    assert [line.split(" ")[0] for line in said] == [f"{path}:{n}:" for n in (2, 3, 4)]
    path.write_text("She questions the timing. \nIt rained.")
    assert load_prompts(str(path)) == ("She questions the timing.", "It rained.")


def test_prompts_with_their_next_sentences_are_demonstrations(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "known.jsonl"
    known = [("It rained.", "He swam across."), ("It rained.", "He ran. Then he sat.")]
    path.write_text("".join(json.dumps({"prompt": p, "next": n}) + "\n" for p, n in known))
    config = ContinuationConfig(
        name="continuation",
        data=str(DATA / "continuation/train.txt"),
        demonstrations=str(path),
    )
    [shown] = build_continuation(config, tokenizer).demonstrations  # two sentences are none
    assert (
        tokenizer.decode([*shown.prompt.prompt, *shown.completion]) == "It rained. He swam across"
    )
    path.write_text('{"prompt": "It rained."}\n[]\n{"prompt": "", "next": "He ran."}\n')
    with pytest.raises(DataError) as caught:
        build_continuation(config, tokenizer)
    said = str(caught.value).split("\n")
    assert [line.split(" ")[0] for line in said] == [f"{path}:{n}:" for n in (1, 2, 3)]
    assert "'next'" in said[0] and "'prompt'" in said[2]


@pytest.mark.parametrize("kind", ["infilling", "continuation"])
def test_a_worked_example_ends_with_the_full_stop(
    kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    task: Task
    if kind == "infilling":
        task = build_infilling(infilling_config(str(DATA / "infilling/train.jsonl")), tokenizer)
    else:
        folder = DATA / "continuation"
        task = build_continuation(
            ContinuationConfig(
                name="continuation",
                data=str(folder / "train.txt"),
                demonstrations=str(folder / "demonstrations.jsonl"),
            ),
            tokenizer,
        )
    told = {
        tokenizer.decode([*d.prompt.prompt, *d.completion]) + ".\n" for d in task.demonstrations
    }
    assert tokenizer.decode(list(worked_examples(task, tokenizer, count=1, seed=0))) in told


def test_the_shipped_files_are_those_that_the_command_writes(tmp_path: Path) -> None:
    write_files(tmp_path, 0)
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        assert path.read_text() == (DATA / path.relative_to(tmp_path)).read_text()


def test_no_shipped_test_prompt_or_story_is_trained_on() -> None:
    for folder, suffix in (("infilling", "jsonl"), ("continuation", "txt")):
        train, test = (
            (DATA / folder / f"{name}.{suffix}").read_text().splitlines()
            for name in ("train", "test")
        )
        assert len(set(test)) == len(test)
        assert not set(test) & set(train)


def test_bleu_gleu_and_distance_by_hand() -> None:
    assert bleu4("He lit a candle", "he lit a candle") == pytest.approx(1.0)
    assert gleu4("He lit a candle", "he lit a candle") == 1.0
    # Of 'he lit a lamp': 3/4 words, 2/3 pairs, 1/2 triples, 0.1/1 fours.
    by_hand = (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25
    assert bleu4("He lit a lamp", "He lit a candle") == pytest.approx(by_hand)
    assert gleu4("He lit a lamp", "He lit a candle") == pytest.approx(6 / 10)
    assert bleu4("", "He ran") == gleu4("", "He ran") == 0.0
    assert word_distance("He lit a lamp", "He lit the lamp up") == pytest.approx(2 / 5)
    assert diversity(["a b", "a c", "a b"], None) == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert diversity(["a"], None) == 0.0
    assert math.isclose(diversity(["a", "b"], lambda ones, others: [0.25]), 0.75)
    assert self_bleu4(["he lit a lamp", "he lit a candle"]) == pytest.approx(by_hand)
    assert self_bleu4(["he ran far off"] * 3) == pytest.approx(1.0)
    assert self_bleu4(["", "he ran"]) == 0.0
    assert self_bleu4(["he ran"]) is None


@pytest.mark.parametrize("name", ["infilling", "continuation"])
def test_the_shipped_configurations_are_measured(name: str) -> None:
    config = load_config(f"tasks/{name}.toml", ["evaluation.max_items=2", "evaluation.samples=3"])
    found = evaluate(config, adapter=None)
    values = {key: metric.value for key, metric in found.metrics.items()}
    numbers = {key: value for key, value in values.items() if value is not None}
    shared = ["diversity", "self_bleu4", f"elbo_T{found.temperature:g}", "ess_share", "seen"]
    assert {metric.items for metric in found.metrics.values()} == {2}
    assert found.metrics["diversity"].sample_size == "2 x 3"
    if name == "infilling":
        assert list(numbers) == [*("bleu4", "gleu4", "exact", "log_reward", "distinct"), *shared]
        assert len(found.examples) == 2
        assert 1 <= numbers["distinct"] <= 3 and 0 <= numbers["bleu4"] <= 1
        assert numbers["log_reward"] < 0
    else:
        assert list(numbers) == ["max_log_likelihood", "mean_log_likelihood", *shared]
        assert numbers["mean_log_likelihood"] <= numbers["max_log_likelihood"] < 0
        assert 0 <= numbers["diversity"] <= 1
    again = evaluate(config, adapter=None)
    assert (again.metrics, again.examples) == (found.metrics, found.examples)
    assert found.task == name and found.seconds is not None and found.seconds > 0


def test_sentences_are_told_before_and_after() -> None:
    config = load_config("tasks/infilling.toml", ["evaluation.max_items=2", "evaluation.samples=2"])
    old = evaluate(config, adapter=None)
    changes = {"bleu4": 2.0, "log_reward": -1e3, "self_bleu4": 1.0}
    new = old.with_metrics(
        {key: old.metrics[key].model_copy(update={"value": v}) for key, v in changes.items()}
    )
    by_label = {row.label: row for row in rows(old, new)}
    assert by_label["BLEU-4 against the true sentence"].after == "200.0%"
    assert by_label["BLEU-4 against the true sentence"].gained
    assert not by_label["log reward, nats"].gained and not by_label["self-BLEU-4"].gained
    assert by_label["log reward, nats"].after == "-1000.00"
    assert "cosine to the true sentence" not in by_label
    assert by_label["of the prompts, trained on too"].after == "0"


@pytest.mark.parametrize("decoding", ["sample", "beam", "diverse_beam"])
def test_of_more_candidates_the_likeliest_that_differ_count(decoding: str, tmp_path: Path) -> None:
    config = sentence_config("continuation", tmp_path)
    assert isinstance(config.task, ContinuationConfig)
    task = build_continuation(config.task, load_base(config.lm).tokenizer)

    def written(samples: int, candidates: int) -> list[tuple[str, float]]:
        asked = {"decoding": decoding, "samples": samples, "candidates": candidates}
        evaluation = config.evaluation.model_copy(update=asked)
        changed = config.model_copy(update={"evaluation": evaluation})
        context = evaluation_context(changed, adapter=None)
        [group] = write_sentences(task, context, task.prompts)
        return [(one.text, one.log_reward) for one in group]

    everything, kept = written(12, 1), written(3, 4)
    assert len(everything) == 12 and len(kept) == 3
    likeliest = sorted(dict(everything).items(), key=lambda one: -one[1])
    assert kept == likeliest[:3]
    if decoding == "beam":
        assert len(dict(everything)) == 12

"""Reasons for labels: what policy and frozen LM read, shipped labels, how answers are counted."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from actors.protocols import RolloutEngine
from actors.reward_query import DirectScorer
from buffer.memory import MemoryStore
from buffer.replay import DrawRequest, ReplayBuffer
from cluster.__main__ import main
from cluster.config.file import PROJECT_ROOT, load_config
from cluster.config.schema import RunConfig
from cluster.reports.score_table import rows
from cluster.run.assembly import load_task, seed_buffer
from cluster.run.evaluation import evaluate
from cluster.run.imitation import imitation
from lm.adapter import adapter_bytes, save_adapter
from lm.merged import save_merged
from lm.model import attach_adapter, load_base
from lm.sampling import Completion, Ended, Request
from reward.request import ScoreItem
from seed_lm.corpus import Share, documents
from seed_lm.review_files import write_files
from seed_lm.review_texts import NAMES_FILM
from seed_lm.reviews import Reviews
from seed_lm.tokenizer import END_OF_TEXT, train_tokenizer
from tasks.config import SubjectivityConfig
from tasks.evaluation.few_shot import TooFewDemonstrations, worked_examples
from tasks.records import DataError
from tasks.subjectivity.data import Label, load_reviews, telling
from tasks.subjectivity.evaluation import Subjectivity, likelier_label, objective_probability
from tasks.subjectivity.task import build_subjectivity
from tests.buffer_toy import replay_of

DATA = PROJECT_ROOT / "tasks/data/subjectivity"
TRAIN, TEST = str(DATA / "train.jsonl"), str(DATA / "test.jsonl")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    pages = documents((Share(Reviews(), 1.0),), "tokenizer")
    raw: RawTokenizer = train_tokenizer(islice(pages, 1000))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END_OF_TEXT)


def build(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, **changes: object) -> Subjectivity:
    fields = {"name": "subjectivity", "reviews": TRAIN, "labels": 10, "tests": (TEST,)} | changes
    return build_subjectivity(SubjectivityConfig.model_validate(fields), tokenizer, seed=seed)


def test_the_policy_reads_no_label_and_the_frozen_lm_the_line_as_readers_write_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    task, review = build(tokenizer, labels=None), load_reviews(TRAIN)[0]
    prompt, z = task.prompts[0], tuple(tokenizer.encode(" about a debt"))
    asked = f'Classify this movie review as objective or subjective: "{review.text}" This review is'
    assert tokenizer.decode(list(prompt.prompt)) == asked
    task.actions.check(z, (False,) * len(z))
    item = task.reward_query.item(prompt, z, np.array([len(z)], dtype=np.int32))
    scored = [*item.context, *item.completion, *item.answer]
    assert scored == tokenizer.encode(f"{asked} about a debt, so it is {review.label}.")
    assert item.answer[0] == task.actions.stop_token
    legal = {tokenizer.decode([token]) for token in task.actions.legal_tokens or ()}
    assert " about" in legal and not {",", ".", '"', "\n", END_OF_TEXT} & legal


def test_supervised_fine_tuning_and_worked_examples_see_labels_without_reasons(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    task = build(tokenizer)
    label_of = {review.text: review.label for review in load_reviews(TRAIN)}
    for shown in task.answered:
        text = tokenizer.decode([*shown.prompt.prompt, *shown.completion])
        review = text.split('"')[1]
        assert text.endswith(f'"{review}" This review is {label_of[review]}.')
    lines = tokenizer.decode(list(worked_examples(task, tokenizer, count=4, seed=0))).split("\n")
    assert lines.pop() == "" and len(lines) == 4
    assert all(line.endswith((" is objective.", " is subjective.")) for line in lines)
    with pytest.raises(TooFewDemonstrations, match="has 10 answered questions"):
        worked_examples(task, tokenizer, count=11, seed=0)


def test_shipped_sets_are_nested_balanced_and_apart_from_what_is_tested(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ten, twenty, fifty = (build(tokenizer, labels=number).prompts for number in (10, 20, 50))
    assert ten == twenty[:10] and twenty == fifty[:20] and len(set(fifty)) == 50
    for prompts in (ten, twenty, fifty):
        labels = [tokenizer.decode(list(prompt.answer)) for prompt in prompts]
        assert labels.count(", so it is objective.") == len(prompts) / 2
    tests = load_reviews(TEST)
    assert len(tests) == 300 and sum(r.label == "objective" for r in tests) == 150
    assert not {review.text for review in tests} & {review.text for review in load_reviews(TRAIN)}
    hasty = sum(r.text.startswith(NAMES_FILM) == (r.label == "subjective") for r in tests)
    assert 130 < hasty < 170


def test_labels_are_drawn_by_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    draws = [build(tokenizer, seed=seed).prompts for seed in (0, 1, 2, 0)]
    assert draws[0] == draws[3] and len({frozenset(one.text for one in d) for d in draws}) == 3
    config = load_config("tasks/subjectivity.toml", ["seed=1", "task.labels=10"])
    assert [prompt.text for prompt in load_task(config)[1].prompts] == [p.text for p in draws[1]]


def test_an_odd_number_and_a_label_that_runs_out_are_drawn_as_even_as_can_be(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    labels = [0] * 2 + [1] * 5
    lines = [json.dumps({"text": f"a film {n}", "label": label}) for n, label in enumerate(labels)]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    for number, objective in ((3, 2), (4, 2), (6, 2)):
        task = build(tokenizer, reviews=str(tmp_path / "few.jsonl"), labels=number, tests=())
        answers = [tokenizer.decode(list(prompt.answer)) for prompt in task.prompts]
        assert (len(answers), answers.count(", so it is objective.")) == (number, objective)


def test_the_shipped_files_are_those_that_the_command_writes(tmp_path: Path) -> None:
    write_files(tmp_path, 0)
    for name in ("train.jsonl", "test.jsonl", "validation.jsonl"):
        assert (tmp_path / name).read_text() == (DATA / name).read_text()


def test_reviews_that_are_trained_on_are_not_tested_on(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "test.jsonl"
    [text] = {p.text.split('"')[1] for p in build(tokenizer).prompts[9:]}
    path.write_text(json.dumps({"text": text, "label": 0}))
    with pytest.raises(DataError, match=r"1 records of task\.tests are among those of task\.rev"):
        build(tokenizer, tests=(str(path),))
    build(tokenizer, labels=3, tests=(str(path),))
    with pytest.raises(DataError, match=r"holds 50 reviews to train on, but .* asks for 51"):
        build(tokenizer, labels=51)


def test_a_label_counts_by_its_probability_behind_the_reason(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    model = tiny_lm("llama").requires_grad_(False)
    texts = [((5, 6, 7), (1, 2)), ((5, 6), ()), ((5, 6, 7), (1, 2))]
    answers: dict[Label, tuple[int, ...]] = {"objective": (9, 3, 4), "subjective": (9, 8)}
    found = objective_probability(model, texts, answers)
    for (x, z), probability in zip(texts, found, strict=True):
        log_p = []
        for y in answers.values():
            text = [*x, *z, *y]
            log_next = model(torch.tensor([text])).logits[0].log_softmax(-1)
            places = range(len(text) - len(y), len(text))
            log_p.append(sum(log_next[at - 1, text[at]].item() for at in places))
        share = math.exp(log_p[0]) / (math.exp(log_p[0]) + math.exp(log_p[1]))
        assert probability == pytest.approx(share, abs=1e-4)
    assert [likelier_label(p) for p in (0.6, 0.4, 0.5, math.nan)] == [
        "objective", "subjective", None, None
    ]  # fmt: skip


def test_supervised_fine_tuning_learns_the_texts_of_the_labels() -> None:
    config = load_config("tasks/subjectivity.toml", ["learner.objective=sft", "task.labels=10"])
    assert config.rollout_actors == config.reward_replicas == 0
    base, task = load_task(config)
    learned = imitation(config, base, task)
    groups = learned.replay.draw(
        DrawRequest(
            num_groups=8,
            num_replayed=2,
            version=0,
            rng=np.random.default_rng(0),
            timeout_s=0.0,
            stop=lambda: False,
        )
    )
    written = {base.tokenizer.decode(g.fresh[0].completion.tolist()) for g in groups}
    assert written == {" objective.", " subjective."}
    assert learned.actions.legal_tokens is None


def test_the_shipped_configuration_is_measured() -> None:
    small = ["evaluation.max_items=3", "evaluation.samples=4"]
    config = load_config("tasks/subjectivity.toml", small)
    found = evaluate(config, adapter=None)
    accuracy, distinct = found.metrics["accuracy"], found.value("distinct")
    assert (accuracy.items, accuracy.samples, accuracy.label) == (3, 4, "reviews labelled right")
    assert distinct is not None and 1 <= distinct <= 4 and len(found.examples) == 3
    again = evaluate(config, adapter=None)
    assert (again.metrics, again.examples) == (found.metrics, found.examples)
    config = load_config("tasks/subjectivity.toml", [*small, "evaluation.shots=2"])
    shown = evaluate(config, adapter=None)
    assert shown.metrics["accuracy"].label == "reviews labelled right, without a reason"
    assert (shown.metrics["accuracy"].samples, shown.value("single")) == (1, None)
    assert shown.value("accuracy") == shown.value("bare")
    better = {"accuracy": accuracy.model_copy(update={"value": 2.0})}
    told = {row.label: row for row in rows(found, found.with_metrics(better))}
    assert told["reviews labelled right"].gained
    assert told["reviews labelled right"].items == "3 x 4"


def changed(config: RunConfig, scale: float) -> tuple[Any, str]:
    """The LM with a random adapter, and its base's fingerprint."""
    base = load_base(config.lm)
    model = attach_adapter(base, config.lora, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, scale, generator=generator)
    return model, base.fingerprint


def test_behind_an_m_step_the_policy_reasons_and_the_new_lm_answers(tmp_path: Path) -> None:
    small = ["evaluation.max_items=6", "evaluation.samples=2", "evaluation.examples=6"]
    config = load_config("tasks/subjectivity.toml", small)
    policy, of_base = changed(config, 0.05)
    save_adapter(policy, tmp_path / "e" / "adapter", of_base)
    left, _ = changed(config, 0.3)
    save_merged(config.lm, adapter_bytes(left), tmp_path / "m" / "model")
    m_step = load_config(
        "tasks/subjectivity.toml",
        [*small, "learner.objective=joint", f"em.policy={tmp_path / 'e' / 'adapter'}"],
    )
    found = evaluate(m_step, adapter=tmp_path / "m" / "adapter")
    by_policy = evaluate(config, adapter=tmp_path / "e" / "adapter")
    alone = evaluate(config.changed({"lm.model": str(tmp_path / "m" / "model")}), adapter=None)
    reasons = [example.rationale for example in found.examples]
    assert reasons == [example.rationale for example in by_policy.examples]
    assert reasons != [example.rationale for example in alone.examples]
    answers = [example.answer for example in found.examples]
    assert answers != [example.answer for example in by_policy.examples]
    assert found.value("bare") == alone.value("bare")


def test_a_run_is_evaluated_as_what_it_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["evaluation.max_items=3", "evaluation.samples=2"]
    steps = ["learner.objective=sft", "learner.steps=1", "learner.warmup_steps=0"]
    train = ["train", "tasks/subjectivity.toml", *small, *steps, "--run", "told", "--local"]
    assert main(train) == 0
    after = json.loads(Path("runs/told/scores.json").read_text())["after"]
    evaluate = ["evaluate", "tasks/subjectivity.toml", *small]
    capsys.readouterr()
    assert main([*evaluate, "--run", "told", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["metrics"]["accuracy"]["label"] == "reviews labelled right, without a reason"
    assert found["step"] == after["step"] == 1
    told = {key: value for key, value in after.items() if key not in ("examples", "seconds")}
    assert told == {key: value for key, value in found.items() if key != "seconds"}
    assert main([*evaluate, "learner.objective=tb", "--run", "told"]) == 1
    assert "how run 'told' learned is read from" in capsys.readouterr().err


@dataclass
class Talker(RolloutEngine):
    """A policy that writes what it is told, and keeps what it was asked."""

    written: list[tuple[int, ...]]
    asked: list[str] = field(default_factory=list)
    polled: int = 0  # of those asked

    def submit(self, requests: Sequence[Request]) -> list[int]:
        self.asked += [self.decode(request.prompt) for request in requests]
        return list(range(len(self.asked) - len(requests), len(self.asked)))

    def poll(self) -> list[Ended]:
        first, self.polled = self.polled, len(self.asked)
        return [
            (
                number,
                Completion(
                    tokens=np.array(z, np.int32),
                    from_tool=np.zeros(len(z), np.bool_),
                    log_q_token=np.zeros(len(z), np.float32),
                    stops=np.arange(1, len(z) + 1, dtype=np.int32),
                    log_q_stop=np.zeros(len(z), np.float32),
                ),
            )
            for number, z in zip(range(first, self.polled), cycle(self.written), strict=False)
        ]

    decode: Callable[[Sequence[int]], str] = str

    def load(self, adapter: bytes) -> None:
        raise NotImplementedError


def test_reasons_that_a_told_base_writes_seed_the_buffer_behind_the_untold_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = "tasks/subjectivity.toml"
    config = load_config(path, ["task.hinted_draws=4", "task.wrong_label_penalty=50"])
    task = build(tokenizer, labels=2, hinted_draws=4, wrong_label_penalty=50.0)
    one, two = (tuple(tokenizer.encode(text)) for text in (" about a debt", " about a film"))
    policy = Talker(written=[one, two], decode=lambda ids: tokenizer.decode(list(ids)))
    answers = list(task.answers.values())

    def frozen_lm(item: ScoreItem) -> NDArray[np.float32]:
        """Finds "objective" likelier behind all that does not end in "film"."""
        objective = tuple(item.answer.tolist()) == answers[0]
        films = tuple(item.completion.tolist()) == two
        likelier = np.where(item.stops == len(two), objective != films, objective)
        return np.where(likelier, -1.0, -2.0).astype(np.float32)

    buffer = ReplayBuffer(
        MemoryStore(), config=config.changed({"buffer.near_duplicate_tolerance": 0.0}).buffer
    )
    scorer = DirectScorer(frozen_lm)
    assert seed_buffer(config, task=task, scorer=scorer, buffer=buffer, policy=policy) == 4
    reviews = {p.text.split('"')[1]: p for p in task.prompts}
    told = [telling(r.text, r.label) for r in load_reviews(TRAIN) if r.text in reviews]
    assert Counter(policy.asked) == dict.fromkeys(told, 4)
    found = {(t.prompt_key, tuple(t.completion.tolist())): t for t in replay_of(buffer)}
    assert len(found) == 4
    for prompt in task.prompts:
        for z in (one, two):
            kept = found[prompt.key, z]
            assert kept.behaviour == "demonstration"
            assert tuple(kept.prompt.tolist()) == prompt.prompt
            right = (z == two) == (prompt.answer == answers[1])
            assert float(kept.log_reward[-1]) == (-1.0 if right else -52.0)
    asked, three = len(policy.asked), tuple(tokenizer.encode(" about a dog"))
    policy.written = [three]
    assert seed_buffer(config, task=task, scorer=scorer, buffer=buffer, policy=policy) == 0
    assert len(policy.asked) == asked and len(replay_of(buffer)) == 4, "drawn again"
    buffer.discard([found[task.prompts[0].key, z] for z in (one, two)])
    assert seed_buffer(config, task=task, scorer=scorer, buffer=buffer, policy=policy) == 1
    assert len(policy.asked) == asked + 4
    assert (
        seed_buffer(config, task=build(tokenizer), scorer=scorer, buffer=buffer, policy=policy) == 0
    )

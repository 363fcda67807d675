"""Reward terms that add up: the law by brute force, and verifiers that fail give no reward."""

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cluster.__main__ import main
from cluster.config.file import load_config
from cluster.config.schema import RunConfig
from cluster.config.validation import ConfigError
from cluster.run.assembly import load_task
from cluster.run.directory import RunDirectory
from cluster.run.evaluation import evaluation_context
from lm.model import LanguageModel
from lm.next_action import NextLogits
from reward.checks import misfit
from reward.packed import suffix_log_rewards
from reward.request import ScoreItem
from reward.terms import RewardTerms, TermScorer, Verdicts, as_score, build_terms
from reward.verifiers import CheckFailed, CheckPool, Failure, UnusableCheck
from tasks.evaluation.evaluation import Scores
from tasks.posterior.assessment import assess
from tasks.posterior.ceiling import ceiling_of
from tasks.posterior.enumeration import PrefixTree, exact_posterior
from tasks.posterior.weights import log_reward_of, log_rewards
from tasks.task import Task
from tests.naive_rewards import naive_log_rewards

TERMS = (
    'reward.terms=[{kind="likelihood", weight=1.25}, {kind="length", weight=-0.3}, '
    '{kind="verifier", check="regex", pattern="ab|d$", weight=2.0}, '
    '{kind="verifier", check="tests.verifier_toy:share_of_c", weight=-1.5}]'
)
MORE = ["task.max_len=3", "posterior.samples=20", "posterior.prompts=2", TERMS]


def by_hand(text: str, log_p: float) -> float:
    found = "ab" in text or text.endswith("d")
    return 1.25 * log_p - 0.3 * len(text) + 2.0 * found - 1.5 * text.count("c") / max(len(text), 1)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config("tasks/toy.toml", MORE)


@pytest.fixture(scope="module")
def toy(config: RunConfig) -> tuple[LanguageModel, Task]:
    return load_task(config)


@pytest.fixture(scope="module")
def terms(config: RunConfig) -> Iterator[RewardTerms]:
    built = build_terms(config.reward, config.lm)
    assert built is not None
    yield built


def all_completions() -> list[str]:
    return ["".join(z) for n in range(4) for z in itertools.product("abcd", repeat=n)]


def test_log_r_of_every_prefix_is_the_sum_by_hand(
    toy: tuple[LanguageModel, Task], terms: RewardTerms
) -> None:
    base, task = toy
    texts = [text for text in all_completions() if len(text) == 3]
    stops = np.arange(4, dtype=np.int32)
    items = [
        task.reward_query.item(task.prompts[2], base.tokenizer.encode(text), stops)
        for text in texts
    ]

    class FrozenLM:
        def submit(self, items: Sequence[ScoreItem]) -> "FrozenLM":
            self.items = items
            return self

        def done(self) -> bool:
            return True

        def result(self, timeout_s: float, /) -> list[NDArray[np.float32]]:
            return suffix_log_rewards(base.model, self.items, 500)

    found = TermScorer(FrozenLM(), terms).submit(items).result(30.0)
    alone = naive_log_rewards(base.model, items)
    for text, log_r_S, log_p_S in zip(texts, found, alone, strict=True):
        expected = [by_hand(text[:t], float(log_p_S[t])) for t in range(4)]
        np.testing.assert_allclose(log_r_S, expected, atol=2e-4)


def test_the_exact_posterior_is_that_of_the_same_sum(
    config: RunConfig, toy: tuple[LanguageModel, Task]
) -> None:
    base, task = toy
    report = assess(task, evaluation_context(config, None))
    for prompt, found in zip(task.prompts, report.prompts, strict=False):
        texts = all_completions()
        items = [
            task.reward_query.item(prompt, z, np.array([len(z)], dtype=np.int32))
            for z in (base.tokenizer.encode(text) for text in texts)
        ]
        log_p = [float(one[-1]) for one in naive_log_rewards(base.model, items)]
        log_r = [by_hand(text, each) for text, each in zip(texts, log_p, strict=True)]
        assert found.enumerable and found.log_z is not None
        assert found.log_z == pytest.approx(np.logaddexp.reduce(log_r), abs=1e-3)
        p = dict(zip(texts, np.exp(log_r - np.logaddexp.reduce(log_r)), strict=True))
        assert found.undersampled
        for one in found.undersampled:
            assert one.p == pytest.approx(p[one.text], abs=1e-4)
        assert not found.texts  # what the LM writes by itself is no sample of this posterior


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_an_enumeration_leaves_out_is_bounded_with_the_terms(
    toy: tuple[LanguageModel, Task], config: RunConfig, temperature: float
) -> None:
    base, task = toy
    prompt, model = task.prompts[0], NextLogits(base.model)
    heavy = TERMS.partition("=")[2].replace("2.0", "12.0").replace("-0.3", "4.0")
    terms = build_terms(load_config("tasks/toy.toml", [f"reward.terms={heavy}"]).reward, config.lm)
    score = log_reward_of(task, base.model, 500, terms)

    def log_weight(completions: Sequence[tuple[int, ...]]) -> NDArray[np.float64]:
        return log_rewards(completions, prompt, task.reward_query, score) / temperature

    everything = [tuple(base.tokenizer.encode(text)) for text in all_completions()]
    for max_nodes in (0, 3, 9):
        ceiling = ceiling_of(
            task, prompt, model, vocab_size=8, temperature=temperature, terms=terms
        )
        tree = PrefixTree(
            prompt.prompt,
            task.actions,
            task.tool,
            [model],
            ceiling,
            vocab_size=8,
            max_nodes=max_nodes,
        )
        support = exact_posterior(tree, log_weight, tolerance=0.0).support
        assert np.isfinite(support.log_left_out_reward)
        left_out = sorted(set(everything) - set(support.completions))
        assert np.logaddexp.reduce(log_weight(left_out)) <= support.log_left_out_reward + 1e-4
    hot = ceiling_of(task, prompt, model, vocab_size=8, temperature=1.3, terms=terms)
    assert hot is None  # T over the weight is above 1


@pytest.mark.parametrize("weight", [0.5, -0.5])
def test_the_most_that_terms_can_add(config: RunConfig, weight: float) -> None:
    changed = config.changed(
        {
            "reward.terms": (
                {"kind": "likelihood"},
                {"kind": "length", "weight": weight},
                {"kind": "verifier", "check": "exact", "weight": 3.0},
                {"kind": "verifier", "check": "exact", "weight": -3.0},
            )
        }
    )
    built = RewardTerms(changed.reward, lambda tokens: "")
    assert built.most(min_len=2, max_len=8) == 3.0 + (4.0 if weight > 0 else -1.0)
    assert (built.most(min_len=2, max_len=None) == np.inf) == (weight > 0)


def test_a_verifier_at_the_end_judges_whole_completions_alone(
    config: RunConfig,
) -> None:
    ends = 'reward.terms=[{kind="likelihood"}, {kind="verifier", check="numeric", where="end"}]'
    with pytest.raises(ConfigError, match='learns from every stop state: set it to "tb"'):
        load_config("tasks/toy.toml", [ends])
    built = build_terms(
        load_config("tasks/toy.toml", [ends, 'learner.objective="tb"']).reward, config.lm
    )
    assert built is not None
    record = json.dumps({"answer": "the sum is 1,000"})
    texts = {"so 7, or 1000.0": 1.0, "1000 or 7": 0.0, "none": 0.0}
    built._decode = lambda tokens: list(texts)[tokens[0]][: None if len(tokens) == 2 else 3]
    items = [
        ScoreItem.of([1], [number, 0], stops=[1, 2], answer=[1], record=record)
        for number in range(3)
    ]
    zeros = [np.zeros(2, dtype=np.float32)] * 3
    found = built.log_rewards(items, zeros)
    assert [each.tolist() for each in found] == [[0.0, score] for score in texts.values()]


@pytest.mark.parametrize(
    ("terms", "told"),
    [
        ('{kind="length"}', 'terms hold 0 of kind = "likelihood", and need one'),
        ('{kind="likelihood", weight=-1.0}', "must be positive"),
        ('{kind="likelihood", check="exact"}', "mean nothing to kind"),
        ('{kind="likelihood"}, {kind="verifier"}', "a verifier needs a check"),
        ('{kind="likelihood"}, {kind="verifier", check="regex"}', "needs a pattern"),
        ('{kind="likelihood"}, {kind="verifier", check="exact", pattern="("}', "no regular"),
        ('{kind="prior"}', "must be 'likelihood', 'verifier' or 'length'"),
    ],
)
def test_a_mistake_in_the_terms_is_one_clear_sentence(terms: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config("tasks/toy.toml", [f"reward.terms=[{terms}]"])


def test_terms_add_to_nothing_where_no_lm_is_asked() -> None:
    with pytest.raises(ConfigError, match=r"reward\.terms add to what the language model says"):
        load_config("tasks/random_number.toml", ['reward.terms=[{kind="likelihood"}]'])


def test_a_price_of_wrong_labels_is_the_language_models_alone() -> None:
    changes = ["task.wrong_label_penalty=50", 'reward.terms=[{kind="likelihood"}, {kind="length"}]']
    load_config("tasks/subjectivity.toml", changes)
    judged = 'reward.terms=[{kind="likelihood"}, {kind="verifier", check="exact"}]'
    with pytest.raises(ConfigError, match="wrong_label_penalty compares what the language model"):
        load_config("tasks/subjectivity.toml", [changes[0], judged])


def test_a_verifier_that_is_not_there_is_told_before_a_run_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    nowhere = 'reward.terms=[{kind="likelihood"}, {kind="verifier", check="no_module:check"}]'
    assert main(["train", "tasks/toy.toml", "--local", "--run", "unverified", nowhere]) == 1
    told = capsys.readouterr().err
    assert "no_module:check: ModuleNotFoundError" in told and "PYTHONPATH" in told
    with pytest.raises(UnusableCheck, match=r"tests\.verifier_toy:nothing: AttributeError"):
        pool("tests.verifier_toy:nothing").start()


def test_a_verifier_that_takes_other_arguments_is_told_before_a_run_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    unfit = (
        'reward.terms=[{kind="likelihood"}, {kind="verifier", check="tests.verifier_toy:shouts"}]'
    )
    assert main(["train", "tasks/toy.toml", "--local", "--dry-run", unfit]) == 1
    told = capsys.readouterr().err
    assert "shouts: it takes (text: str) -> str, and it is called with text and record" in told
    assert "PYTHONPATH" not in told
    with pytest.raises(UnusableCheck, match=r"verifier_toy:time: it is a module, and no function"):
        pool("tests.verifier_toy:time").start()
    pool("builtins:divmod").start()  # whose parameters have other names


def pool(*names: str, deadline_s: float = 1.0, pattern: str | None = None) -> CheckPool:
    return CheckPool(
        [(name, pattern) for name in names], as_score, processes=2, deadline_s=deadline_s
    )


def made(checks: CheckPool, calls: list[tuple[Any, ...]]) -> list[Any]:
    return [one for portion in checks.submit(calls) for one in portion.result(60.0)]


@pytest.mark.parametrize("behaviour", ["raises", "hangs", "dies", "leaves"])
def test_a_verifier_that_fails_once_is_asked_again(tmp_path: Path, behaviour: str) -> None:
    checks = pool("tests.verifier_toy:misbehaves")
    record = json.dumps({"marker": str(tmp_path / "seen")})
    calls = [(0, text, record) for text in ("fine", f"{behaviour} once", "well")]
    assert made(checks, calls) == [0.5, 1.0, 0.5] and checks.failures == 1


@pytest.mark.parametrize(
    ("text", "word", "reason"),
    [
        ("raises", "", r"ValueError: no verdict \(.*verifier_toy.py:\d+\)"),
        ("hangs", "", r"no answer within 0\.4 s"),
        ("dies", "", r"its process ended \(exit status 3\)"),
        ("says", "nan", "returned nan, which is no number from 0 to 1"),
        ("says", "much", "returned 1.5"),
        ("says", "text", "returned '1'"),
        ("says", "list", r"returned \[1\]"),
    ],
)
def test_what_fails_every_time_is_a_failure_and_never_a_score(
    tmp_path: Path, text: str, word: str, reason: str
) -> None:
    checks = pool("tests.verifier_toy:misbehaves", deadline_s=0.4)
    record = json.dumps({"marker": str(tmp_path / "seen"), "word": word})
    fine, failed = made(checks, [(0, "fine", record), (0, text, record)])
    assert fine == 0.5 and isinstance(failed, Failure) and checks.failures == 3
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(failed.reason)


def test_a_verifier_that_hangs_always_is_given_up_and_one_that_hangs_at_times_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reward.verifiers._GIVEN_UP", 4)
    record = json.dumps({"marker": str(tmp_path / "seen")})
    hanging = [(0, f"text {number}", record) for number in range(20)]
    checks = CheckPool([("tests.verifier_toy:hangs", None)], as_score, processes=1, deadline_s=0.2)
    found = made(checks, hanging)
    assert checks.failures == 4 and all(isinstance(one, Failure) for one in found)
    assert "tests.verifier_toy:hangs: no answer within 0.2 s" in found[0].reason
    assert "not asked any more: it has ended 4 processes" in found[-1].reason
    checks = CheckPool(
        [("tests.verifier_toy:misbehaves", None)], as_score, processes=1, deadline_s=0.2
    )
    calls = [(0, "fine", record), *[(0, f"hangs{' ' * number}", record) for number in range(3)]]
    assert made(checks, calls)[0] == 0.5 and checks.failures == 7  # the last hangs once


def test_a_verifier_that_forked_is_ended_with_what_it_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reward.verifiers._GRACE_S", 0.3)
    checks = pool("tests.verifier_toy:misbehaves", deadline_s=0.3)
    record = json.dumps({"marker": str(tmp_path / "seen")})
    (failed,) = made(checks, [(0, "forks", record)])
    assert isinstance(failed, Failure) and "no answer within 0.3 s" in failed.reason


def test_a_wait_for_verifiers_that_ends_says_whose_and_how_long() -> None:
    verdicts = Verdicts([], [Future()], pool("exact"))
    with pytest.raises(TimeoutError, match=r"verifiers: .* longer than 600 s: raise reward\.veri"):
        verdicts.wait(600.0, strict=False, since_s=monotonic() - 600.0)


def test_a_call_that_no_python_can_interrupt_is_ended() -> None:
    checks = pool("regex", deadline_s=0.5, pattern="(a+)+$")
    (failed,) = made(checks, [(0, "a" * 60 + "b", "{}")])
    assert isinstance(failed, Failure) and "no answer within 0.5 s" in failed.reason


@pytest.mark.parametrize(
    ("check", "pattern", "text", "score"),
    [
        ("exact", None, " 1,000.0\n", 1.0),
        ("exact", None, "it is 1000", 0.0),
        ("exact", r"boxed\{(.*?)\}", r"boxed{7}, no: boxed{1000}", 1.0),
        ("exact", r"boxed\{(.*?)\}", "1000", 0.0),
        ("numeric", None, "7 and so $1,000.", 1.0),
        ("numeric", None, "1000 and 7", 0.0),
        ("numeric", None, "it is 1,000 and 2,1000", 1.0),
        ("numeric", None, "coords 10,00", 0.0),
        ("numeric", "#### (.*)", "#### 1000 apples. 7", 0.0),
        ("numeric", "#### (.*?) ", "#### 1000 apples. 7", 1.0),
        ("regex", "^so", "so", 1.0),
        ("regex", "^so", "not so", 0.0),
        ("regex", "(no)|so", "so", 1.0),
    ],
)
def test_built_in_checks(check: str, pattern: str | None, text: str, score: float) -> None:
    record = json.dumps({"answer": "1000"})
    assert made(pool(check, pattern=pattern), [(0, text, record)]) == [score]


def test_one_item_that_cannot_be_judged_has_no_reward_and_the_others_theirs(
    tmp_path: Path, config: RunConfig
) -> None:
    check = {"kind": "verifier", "check": "tests.verifier_toy:misbehaves", "weight": 2.0}
    changed = config.changed({"reward.terms": ({"kind": "likelihood"}, check)})
    built = RewardTerms(changed.reward, lambda tokens: "raises" if 3 in tokens else "fine")
    record = json.dumps({"marker": str(tmp_path / "seen")})
    items = [
        ScoreItem.of([1], z, stops=[1, 2], answer=[1], record=record) for z in ([1, 2], [3, 2])
    ]
    log_p = [np.zeros(2, dtype=np.float32)] * 2
    verdicts = built.judge(items)
    verdicts.wait(30.0, strict=False)
    found = built.add(items, log_p, verdicts)
    assert [each.tolist() for each in found] == [[1.0, 1.0], []]
    with pytest.raises(CheckFailed, match=r"1 of 2 checks failed, .* ValueError: no verdict"):
        built.log_rewards(items, log_p)


def test_a_verifier_that_failed_on_one_row_ends_a_run_only_where_it_fails_on_and_on(
    tmp_path: Path, config: RunConfig
) -> None:
    check = {"kind": "verifier", "check": "tests.verifier_toy:misbehaves"}
    changed = config.changed({"reward.terms": ({"kind": "likelihood"}, check)})
    record = json.dumps({"marker": str(tmp_path / "seen")})
    fine, bad = (
        [ScoreItem.of([1], [token], stops=[1], answer=[1], record=record)] for token in (2, 3)
    )

    def terms() -> RewardTerms:
        return RewardTerms(changed.reward, lambda tokens: "raises" if 3 in tokens else "fine")

    built = terms()
    built.judge(fine).wait(30.0, strict=False)
    for _ in range(2):  # a scoring that it judges begins the row anew
        for _ in range(15):
            verdicts = built.judge(bad)
            verdicts.wait(30.0, strict=False)
            assert [
                len(sums) for sums in built.add(bad, [np.zeros(1, dtype=np.float32)], verdicts)
            ] == [0]
        built.judge(fine).wait(30.0, strict=False)
    for _ in range(15):
        built.judge(bad).wait(30.0, strict=False)
    with pytest.raises(CheckFailed, match=r"1 of 1 checks failed, .* ValueError: no verdict"):
        built.judge(bad).wait(30.0, strict=False)
    unknown = terms()  # it has never given a value
    for _ in range(2):
        unknown.judge(bad).wait(30.0, strict=False)
    with pytest.raises(CheckFailed, match="1 of 1 checks"):
        unknown.judge(bad).wait(30.0, strict=False)
    # A sound one that cannot judge what an actor asks first is no broken one.
    unlucky = terms()
    for asked in (bad, bad, fine, bad, bad, bad):
        unlucky.judge(asked).wait(30.0, strict=False)
    with pytest.raises(CheckFailed, match="1 of 1 checks"):  # of an evaluation, which asks once
        terms().scores(bad)


def test_a_verifier_that_never_gives_a_value_ends_the_run_beside_one_that_does(
    tmp_path: Path, config: RunConfig
) -> None:
    checks = ("exact", "tests.verifier_toy:misbehaves")
    verifiers = ({"kind": "verifier", "check": check} for check in checks)
    changed = config.changed({"reward.terms": ({"kind": "likelihood"}, *verifiers)})
    built = RewardTerms(changed.reward, lambda tokens: "raises")
    record = json.dumps({"answer": "1", "marker": str(tmp_path / "seen")})
    items = [ScoreItem.of([1], [2], stops=[1], answer=[1], record=record)]
    for _ in range(2):
        built.judge(items).wait(30.0, strict=False)
    with pytest.raises(CheckFailed, match=r"1 of 1 checks failed, .*misbehaves: ValueError"):
        built.judge(items).wait(30.0, strict=False)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_training_ends_at_the_posterior_of_likelihood_and_verifier() -> None:
    verifier = '{kind="verifier", check="regex", pattern="ab|d$", weight=2.0}'
    terms = f'reward.terms=[{{kind="likelihood"}}, {verifier}]'
    assert main(["train", "tasks/toy.toml", "--local", "--run", "judged", terms]) == 0
    scores = Scores.model_validate_json(RunDirectory("judged").scores_file.read_text())
    assert scores.before is not None and scores.after is not None
    before, after = scores.before.value("tv"), scores.after.value("tv")
    assert before is not None and before > 0.2
    assert after is not None and after <= 0.05


def test_a_function_takes_what_its_decorator_takes() -> None:
    def judge(text: str, record: object, limit: int) -> float:
        return float(len(text) < limit)

    @functools.wraps(judge)
    def limited(text: str, record: object) -> float:
        return judge(text, record, 9)

    given = ("text", "record")
    assert misfit(judge, given) and not misfit(limited, given)
    assert misfit(functools.cache(judge), given) and not misfit(functools.cache(limited), given)

    class Judge:
        @functools.cache  # noqa: B019
        def score(self, text: str, record: object) -> float:
            return 0.0

    assert not misfit(Judge().score, given) and misfit(Judge().score, ["text"])

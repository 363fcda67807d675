"""Arithmetic: data files, the task on them, and the vote of the evaluation."""

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.prompts import Prompt
from lm.config import LMConfig
from lm.model import load_base
from lm.sampling import Completion, Request
from lm.spelling import spell, spell_after
from lm.tools import ToolFault
from seed_lm import arithmetic_files
from seed_lm.worked_sums import OPERATORS, is_held_out
from tasks.arithmetic.data import load_demonstrations, load_items
from tasks.arithmetic.expression import Expression, Operator, answer_text, parse_question
from tasks.arithmetic.task import Arithmetic, build_arithmetic
from tasks.config import ArithmeticConfig
from tasks.evaluation.accuracy import (
    Voted,
    lost,
    spread_metrics,
    vote,
    vote_metrics,
)
from tasks.records import DataError
from tasks.task import TestQuestion, Tokenizer

DATA = arithmetic_files.FOLDER
GOOD = {"str_query": "Question: 6 - 0 - 4 = ? Answer:", "num_sol": 2}


def configuration(**changes: Any) -> ArithmeticConfig:
    values: dict[str, Any] = {
        "name": "arithmetic",
        "demonstrations": str(DATA / "demonstrations.json"),
        "questions": str(DATA / "questions.json"),
        "tests": tuple(str(DATA / f"test_{n}.json") for n in (3, 4, 5)),
    }
    return ArithmeticConfig(**(values | changes))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    model = Path(arithmetic_files.__file__).parent / "model"
    return load_base(LMConfig(model=str(model), device="cpu")).tokenizer


@pytest.fixture(scope="module")
def task(tokenizer: Tokenizer) -> Arithmetic:
    return build_arithmetic(configuration(), tokenizer)


# --- expressions ------------------------------------------------------------------------------


def test_values_equal_python_s_own_on_every_three_operand_expression() -> None:
    for operands in product(range(10), repeat=3):
        for operators in product(OPERATORS, repeat=2):
            expression = Expression(operands, operators)
            assert expression.value == eval(expression.text)
            assert parse_question(expression.question) == expression


@pytest.mark.parametrize(
    "text",
    [
        "Question: 6 = ? Answer:",
        "Question: 6 * 2 = ? Answer:",
        "Question: 16 - 2 = ? Answer:",
        "Question: 6 -2 = ? Answer:",
        "Question: 6 - 2 = ? Answer: ",
        "Question: ٣ - 2 = ? Answer:",
        "",
    ],
)
def test_other_questions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Question: a"):
        parse_question(text)


# --- data files -------------------------------------------------------------------------------


def write(path: Path, records: object) -> str:
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"num_sol": 2}, "key 'str_query'"),
        ({**GOOD, "num_sol": "2"}, "key 'num_sol'"),
        ({**GOOD, "num_sol": True}, "key 'num_sol'"),
        ({**GOOD, "num_sol": 3}, r"key 'num_sol' is 3, but 6 - 0 - 4 = 2"),
        ({**GOOD, "str_query": "Question: 6 - x = ? Answer:"}, "key 'str_query'"),
        ({**GOOD, "str_sol": "The answer is 2."}, "key 'str_sol'"),
        ({**GOOD, "str_rationale": "6 - 0 = 6"}, "key 'str_rationale': step '6 - 0 = 6'"),
        ({**GOOD, "str_rationale": "6 - 0 - 4 ="}, "key 'str_rationale'"),
        ({**GOOD, "str_rationale": "6 - 0 =, 9 - 9 ="}, "the last step '9 - 9 =' does not come to"),
        ({**GOOD, "rationale": "6 - 0 ="}, "key 'rationale'"),
        ("Question: 6 - 0 - 4 = ? Answer:", "str_query"),
    ],
)
def test_a_bad_item_is_named_by_file_number_and_key(
    tmp_path: Path, record: object, complaint: str
) -> None:
    path = write(tmp_path / "bad.json", [GOOD, GOOD, record])
    with pytest.raises(DataError, match=rf"bad\.json: item 3: .*{complaint}"):
        load_items(path)


def test_a_file_that_is_no_list_of_items_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: cannot read it .*check the path"):
        load_items(str(tmp_path / "none.json"))
    with pytest.raises(DataError, match=r"list\.json: must hold a list"):
        load_items(write(tmp_path / "list.json", {"a": 1}))
    with pytest.raises(DataError, match=r"list\.json: must hold a list"):
        load_items(write(tmp_path / "list.json", []))
    (tmp_path / "cut.json").write_text('[{"str_query": ', encoding="utf-8")
    with pytest.raises(DataError, match=r"cut\.json: not JSON: .*line 1 column"):
        load_items(str(tmp_path / "cut.json"))
    (tmp_path / "latin.json").write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match=r"latin\.json: not text in UTF-8"):
        load_items(str(tmp_path / "latin.json"))


def test_a_demonstration_without_a_rationale_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "demos.json", [{**GOOD, "str_rationale": "6 - 0 =, 6 - 4 ="}, GOOD])
    with pytest.raises(DataError, match=r"item 2: key 'str_rationale' is missing"):
        load_demonstrations(path)


def test_the_shipped_files_are_those_of_the_command(tmp_path: Path) -> None:
    arithmetic_files.write_files(tmp_path, seed=0)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {file.name for file in DATA.iterdir()}
    assert all((tmp_path / name).read_bytes() == (DATA / name).read_bytes() for name in names)


def test_test_questions_stand_in_no_training_file_and_in_no_corpus() -> None:
    training = load_demonstrations(str(DATA / "demonstrations.json"))
    training += load_items(str(DATA / "questions.json"))
    assert (len(training), {len(item.expression.operands) for item in training}) == (1050, {3, 4})
    trained = {item.expression for item in training}
    for operands in (3, 4, 5):
        tested = [item.expression for item in load_items(str(DATA / f"test_{operands}.json"))]
        assert len(set(tested)) == len(tested) == 500
        assert not trained & set(tested)
        assert all(is_held_out(one) and len(one.operands) == operands for one in tested)


# --- the task ---------------------------------------------------------------------------------


def test_demonstrations_are_what_the_policy_would_have_sampled(task: Arithmetic) -> None:
    assert len(task.demonstrations) == 50
    for one in task.demonstrations:
        expression = parse_question(one.prompt.text)
        text = task.tokenizer.decode(list(one.completion))
        assert text == " " + ", ".join(step.text for step in expression.steps)
        task.actions.check(one.completion, one.from_tool)
        assert task.verdict(one.prompt, one.completion)
        at = 0
        while at < len(one.completion):  # the calculator alone explains every mark
            at += 1
            if one.completion[at - 1] in task.tool.triggers:
                output = task.tool.output(one.completion[:at])
                assert list(one.completion[at : at + len(output)]) == output
                assert all(one.from_tool[at : at + len(output)]) and not one.from_tool[at - 1]
                at += len(output)
        assert sum(one.from_tool) == sum(
            len(spell(task.tokenizer, f" {step.result}")) for step in expression.steps
        )


def test_every_training_question_is_a_prompt_and_demonstrations_weigh_more(
    task: Arithmetic,
) -> None:
    assert len(task.prompts) == len({prompt.key for prompt in task.prompts}) == 1050
    assert [prompt.weight for prompt in task.prompts] == [1.0] * 50 + [0.2] * 1000
    for prompt in task.prompts[::50]:
        text = task.tokenizer.decode([*prompt.prompt, *prompt.answer])
        assert text == prompt.text + answer_text(parse_question(prompt.text).value)
        assert prompt.answer[0] == task.actions.stop_token


def test_legal_tokens_spell_sums_and_nothing_else(task: Arithmetic) -> None:
    assert task.actions.legal_tokens is not None
    texts = {task.tokenizer.decode([token]) for token in task.actions.legal_tokens}
    digits = {f"{space}{digit}" for space in ("", " ") for digit in range(10)}
    assert digits | {" +", " -", " =", ",", "-", "+", "="} <= texts
    assert all(set(text) <= set("0123456789+-=, ") for text in texts)
    assert task.actions.stop_token not in task.actions.legal_tokens


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(OPERATORS)), min_size=2, max_size=6))
def test_the_verdict_is_right_exactly_when_the_last_result_is(
    task: Arithmetic, terms: list[tuple[int, Operator]]
) -> None:
    operands = tuple(operand for operand, _ in terms)
    expression = Expression(operands, tuple(operator for _, operator in terms[1:]))
    prompt = Prompt(
        key="",
        text=expression.question,
        prompt=spell(task.tokenizer, expression.question),
        answer=spell(task.tokenizer, answer_text(expression.value)),
    )
    for cut in range(1, len(expression.steps) + 1):
        steps = expression.steps[:cut]
        tokens = spell(task.tokenizer, " " + ", ".join(step.text for step in steps))
        assert task.verdict(prompt, tokens) == (steps[-1].result == eval(expression.text))
    assert not task.verdict(prompt, spell(task.tokenizer, f" {expression.value}"))
    assert not task.verdict(prompt, ())


def test_the_longest_chain_of_six_operands_fits(task: Arithmetic) -> None:
    question = "Question: 0 - 9 - 9 - 9 - 9 - 9 = ? Answer:"
    steps = parse_question(question).steps
    tokens = spell(task.tokenizer, " " + ", ".join(step.text for step in steps))
    assert len(tokens) <= task.actions.max_len


def test_reward_demonstrations_stand_in_front_of_the_question(tokenizer: Tokenizer) -> None:
    context = build_arithmetic(
        configuration(reward_demonstrations=2), tokenizer
    ).reward_query.context
    lines = tokenizer.decode(list(context)).split("\n")
    assert len(lines) == 3 and lines[2] == ""
    for line in lines[:2]:
        question, _, worked = line.partition("Answer:")
        assert worked.endswith(answer_text(parse_question(f"{question}Answer:").value))
    with pytest.raises(ValueError, match=r"51, but .* holds 50"):
        build_arithmetic(configuration(reward_demonstrations=51), tokenizer)


# --- the vote ---------------------------------------------------------------------------------


class Script:
    """A policy that says what a function of the prompt's text and a running number tells it to."""

    def __init__(self, tokenizer: Tokenizer, reply: Callable[[str, int], str]) -> None:
        self._tokenizer, self._reply = tokenizer, reply
        self.asked: list[str] = []

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        return [self._complete(self._tokenizer.decode(list(one.prompt))) for one in requests]

    def _complete(self, text: str) -> Completion:
        self.asked.append(text)
        tokens = spell(self._tokenizer, self._reply(text, len(self.asked) - 1))
        marks, none = np.zeros(len(tokens), dtype=np.bool_), np.zeros(0, dtype=np.float32)
        return Completion(
            tokens=np.array(tokens, dtype=np.int32),
            from_tool=marks,
            log_q_token=np.zeros(len(tokens), dtype=np.float32),
            stops=np.zeros(0, dtype=np.int32),
            log_q_stop=none,
        )

    def load(self, adapter: bytes) -> None: ...


def item(task: Arithmetic, text: str, *, unseen: bool = True) -> TestQuestion:
    expression = parse_question(text)
    asked = Prompt(key=text, text=text, prompt=spell(task.tokenizer, text), answer=())
    return TestQuestion(
        prompt=asked,
        answer=expression.value,
        group=str(len(expression.operands)),
        unseen=unseen,
    )


def test_a_rationale_that_a_tool_ended_is_a_vote_for_none(task: Arithmetic) -> None:
    question = item(task, "Question: 1 + 1 - 3 = ? Answer:")
    told = Script(task.tokenizer, lambda text, number: " -1.")
    asked, z = question.prompt.prompt, tuple(spell(task.tokenizer, " 1 + 1 = 2, 2 - 3 = -1"))
    ways: dict[str, Any] = {"decode": task.tokenizer.decode, "parse": task.parse_answer}
    [voted] = vote([question], [asked], [[None, z, None]], answer=told.sample, **ways)
    assert voted.answers == (None, -1, None) and not voted.right
    assert voted.rationales[0] is None and voted.share_right == 1 / 3
    [twice] = vote([question], [asked], [[None, z, z]], answer=told.sample, **ways)
    assert spread_metrics([twice], samples=3)["3 spread edit_distance"].value == 0
    assert spread_metrics([voted], samples=3)["3 spread edit_distance"].value is None
    drawn: Any = [[ToolFault(KeyError("nine")), told.sample([Request(prompt=asked)])[0]]]
    said = "1 of 2 rationales were ended by a tool, and lead to no answer: KeyError: 'nine'"
    assert (lost(drawn), lost(drawn[:0])) == (said, "")


def ask(
    task: Arithmetic, items: list[TestQuestion], policy: Script, answerer: Script, n: int
) -> Any:
    drawn = [policy.sample([Request(prompt=one.prompt.prompt)] * n) for one in items]
    return vote(
        items,
        [one.prompt.prompt for one in items],
        [[tuple(z.tokens.tolist()) for z in same] for same in drawn],
        answer=answerer.sample,
        decode=task.tokenizer.decode,
        parse=task.parse_answer,
        lead=spell_after(task.tokenizer, " 1", ". The answer is"),
    )


def test_the_commonest_answer_counts_and_unparsable_text_is_a_vote_for_none(
    task: Arithmetic,
) -> None:
    question = item(task, "Question: 1 + 1 - 3 = ? Answer:")  # -1
    chains = [" 1 + 1 = 2, 2 - 3 = -1", " 1 - 3 = -2, -2 + 1 = -1", " 9 + 9 = 18", " 0", " 0 ="]

    def answer(text: str, _: int) -> str:
        return " -1." if text.endswith("-1. The answer is") else " ."

    policy = Script(task.tokenizer, lambda _, number: chains[number])
    [voted] = ask(task, [question], policy, Script(task.tokenizer, answer), 5)
    assert voted.answers == (-1, -1, None, None, None)
    assert voted.answer is None and not voted.right and voted.distinct_right == 2
    metrics = vote_metrics([voted], samples=5)
    values = [metrics[name].value for name in ("3", "3 unparsable", "3 distinct_right")]
    assert values == [0.0, 0.6, 2.0]


def test_what_the_policy_draws_is_counted_too(task: Arithmetic) -> None:
    question = item(task, "Question: 1 + 1 - 3 = ? Answer:")
    voted = Voted(item=question, rationales=("abcd", "abcd", "abxy"), answers=(-1, -1, 5))
    values = {name: metric.value for name, metric in spread_metrics([voted], samples=3).items()}
    assert values == {
        "3 spread right": pytest.approx(2 / 3),
        "3 spread distinct_right": 1.0,
        "3 spread edit_distance": pytest.approx((0 + 0.5 + 0.5) / 3),
    }


@pytest.mark.parametrize("text", ["", ".", " .", ". The answer is -1.", " -1", "  -1."])
def test_text_that_is_no_answer_is_no_number(task: Arithmetic, text: str) -> None:
    assert task.parse_answer(text) is None
    assert task.parse_answer(" -1. Question: 2") == task.parse_answer("-1.") == -1


def test_equal_rationales_of_one_question_are_answered_once(task: Arithmetic) -> None:
    questions = [item(task, f"Question: {n} + 1 + 1 = ? Answer:") for n in range(3)]
    policy = Script(task.tokenizer, lambda text, _: " 1 + 1 = 2")
    answerer = Script(task.tokenizer, lambda text, _: " 2.")
    voted = ask(task, questions, policy, answerer, 10)
    said = " 1 + 1 = 2. The answer is"
    assert answerer.asked == [f"{one.prompt.text}{said}" for one in questions]
    assert [one.right for one in voted] == [True, False, False]


def test_scores_are_apart_for_operands_and_for_unseen_questions(task: Arithmetic) -> None:
    questions = [
        item(task, "Question: 1 + 1 + 0 = ? Answer:", unseen=False),
        item(task, "Question: 2 + 1 + 0 = ? Answer:"),
        item(task, "Question: 2 + 0 + 1 + 0 = ? Answer:", unseen=False),
    ]
    policy = Script(task.tokenizer, lambda text, _: " 1 + 1 = 2")
    answerer = Script(task.tokenizer, lambda text, _: " 2.")
    metrics = vote_metrics(ask(task, questions, policy, answerer, 2), samples=2)
    assert list(dict.fromkeys(metric.group for metric in metrics.values())) == ["3", "4"]
    assert (metrics["3"].items, metrics["3"].value) == (2, 0.5)
    assert (metrics["3 unseen"].items, metrics["3 unseen"].value) == (1, 0.0)
    assert (metrics["4 unseen"].items, metrics["4 unseen"].value) == (0, None)


def test_a_test_question_of_the_training_data_is_not_unseen(
    task: Arithmetic, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    seen, fresh = task.prompts[0].text, "Question: 0 + 0 + 0 + 0 + 0 = ? Answer:"
    records = [{"str_query": q, "num_sol": parse_question(q).value} for q in (seen, fresh)]
    tests = (write(tmp_path / "test.json", records),)
    [items] = build_arithmetic(configuration(tests=tests), tokenizer).held_out["test"]
    assert [one.unseen for one in items] == [False, True]
    assert [one.answer for one in items] == [parse_question(q).value for q in (seen, fresh)]

"""Somebody's questions: rows of any format, templates in a model's tokens, bad rows all told."""

import importlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pyarrow import Table, parquet
from pydantic import ValidationError

from cluster.config.file import PROJECT_ROOT, load_config
from cluster.config.validation import ConfigError
from cluster.run.evaluation import evaluate
from lm.config import LMConfig
from lm.hub import load_tokenizer
from lm.spelling import TokenizerUnfit, spell
from lm.tools import ToolFailed
from reward.checks import canonical, last_number
from reward.verifiers import UnusableCheck
from tasks.config import QuestionsConfig
from tasks.questions.task import Questions, build_questions
from tasks.records import DataError, missing_files

ROWS: list[dict[str, object]] = [
    {"question": "3 + 4", "answer": 7, "rationale": "3 + 4 = 7"},
    {"question": "9 - 2 - 1", "answer": "6"},
]
LINE = "Question: {question} = ? Answer:"
tokenizer = load_tokenizer(LMConfig(model=str(PROJECT_ROOT / "seed_lm/model")))


def write(folder: Path, rows: Sequence[object], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return str(path)


def build(data: str, **changes: Any) -> Questions:
    fields = {"name": "questions", "data": data, "x": LINE, "y": ". The answer is {answer}."}
    return build_questions(QuestionsConfig.model_validate(fields | changes), tokenizer)


def test_frozen_lm_and_policy_read_the_templates_as_one_text(tmp_path: Path) -> None:
    task = build(write(tmp_path, ROWS))
    known, other = task.prompts
    assert tokenizer.decode(list(other.prompt)) == "Question: 9 - 2 - 1 = ? Answer:"
    (shown,) = task.demonstrations
    stops = np.array([len(shown.completion)], dtype=np.int32)
    item = task.reward_query.item(known, shown.completion, stops)
    whole = "Question: 3 + 4 = ? Answer: 3 + 4 = 7. The answer is 7."
    assert (*item.context, *item.completion, *item.answer) == spell(tokenizer, whole)
    assert item.answer[0] == task.actions.stop_token  # Z ends by the token that Y begins with


def test_every_bad_row_is_named_at_once(tmp_path: Path) -> None:
    rows = [
        {"question": "1 + 1", "answer": 2},
        "{",
        {"query": "1 + 2", "answer": 3},
        {"question": "1 + 3", "answer": None},
        {"question": "1 + 4", "answer": 5, "rationale": "word by word " * 40},
        [1],
    ]
    with pytest.raises(DataError) as caught:
        build(write(tmp_path, rows))
    told = str(caught.value).splitlines()
    assert [line.split(": ")[0].rpartition(":")[2] for line in told] == ["2", "3", "4", "5", "6"]
    assert "no column 'question'; it has query, answer: name yours in task.question" in told[1]
    assert "'answer' is None" in told[2] and "max_len=64" in told[3]


def test_columns_have_the_names_that_the_data_gives_them(tmp_path: Path) -> None:
    rows = [{"q": "2 + 2", "gold": 4.0, "why": "2 + 2 = 4", "level": "easy"}]
    task = build(
        write(tmp_path, rows), question="q", answer="gold", rationale="why", x="({level}) {q}:"
    )
    (prompt,) = task.prompts
    assert prompt.text == "(easy) 2 + 2:" and len(task.demonstrations) == 1
    assert tokenizer.decode(list(prompt.answer)) == ". The answer is 4."
    with pytest.raises(DataError, match="'levle', in which it has no text; it has q, gold"):
        build(write(tmp_path, rows), question="q", answer="gold", x="({levle}) {q}:")


def test_a_csv_file_is_read_too_and_only_so_many_of_its_rows(tmp_path: Path) -> None:
    data = write(tmp_path, ["question,answer", "1 + 1,2", "1 + 2,3"], "rows.csv")
    assert [p.text for p in build(data, x="{question}:").prompts] == ["1 + 1:", "1 + 2:"]
    assert len(build(data, max_questions=1).prompts) == 1


def test_a_row_of_a_csv_file_may_leave_its_rationale_out(tmp_path: Path) -> None:
    rows = ["question,answer,rationale", "1 + 1,2,", "1 + 2,3,1 + 2 = 3"]
    task = build(write(tmp_path, rows, "rows.csv"))
    assert len(task.prompts) == 2 and len(task.demonstrations) == 1
    with pytest.raises(DataError, match="column 'rationale' is 7: give it a text"):
        build(write(tmp_path, [ROWS[0] | {"rationale": 7}]))


def test_parquet_is_read_too_and_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(Table.from_pylist([{"question": "1 + 1", "answer": 2}]), path)
    assert [p.text for p in build(str(path), x="{question}:").prompts] == ["1 + 1:"]
    with pytest.raises(DataError, match=r"none\.parquet: (not Parquet|cannot read it)"):
        build(write(tmp_path, ["nothing"], "none.parquet"))


def test_a_dataset_is_streamed_at_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(*arguments: object, **more: object) -> list[dict[str, object]]:
        asked.extend((*arguments, more))
        return [{"question": "1 + 1", "answer": 2}, {"question": "1 + 2"}]

    library = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setattr(importlib, "import_module", lambda name: library)
    with pytest.raises(DataError, match=r"^some/sums: set task\.revision to the commit"):
        build("some/sums")
    with pytest.raises(DataError, match=r"^some/sums:test: row 2 of test: has no column 'answer'"):
        build("some/sums:test", revision="a" * 40, subset="easy")
    more = {"split": "test", "revision": "a" * 40, "streaming": True}
    assert asked == ["some/sums", "easy", more]


def test_the_tool_speaks_in_demonstrations_as_it_would(tmp_path: Path) -> None:
    data = write(tmp_path, ROWS)
    (shown,) = build(data, tools=("calculator",), legal="0123456789+-=, ").demonstrations
    said = [token for token, tool in zip(shown.completion, shown.from_tool, strict=True) if tool]
    assert tokenizer.decode(said) == " 7"
    wrong = write(tmp_path, [ROWS[0] | {"rationale": "3 + 4 = 8"}])
    with pytest.raises(DataError, match="which says ' 7' behind"):
        build(wrong, tools=("calculator",))


def test_a_function_of_ones_own_speaks_too(tmp_path: Path) -> None:
    build_own = partial(build, write(tmp_path, ROWS[1:]), tool_deadline_s=20.0)
    tool = build_own(tools=("tests.verifier_toy:shouts",)).tool
    assert tool is not None
    assert tokenizer.decode(tool.output(spell(tokenizer, " so a ="))) == " A"
    assert tool.output(spell(tokenizer, " is it ? =")) == []
    assert {tokenizer.decode([token])[-1] for token in tool.triggers} == {"="}
    silent = build_own(tools=("tests.verifier_toy:is_silent",)).tool
    assert silent is not None
    with pytest.raises(ToolFailed, match=r"task\.tools: .*:is_silent: a tool returned 7"):
        silent.output(spell(tokenizer, " 1 ="))
    with pytest.raises(UnusableCheck, match="no_module:tool"):
        build_own(tools=("no_module:tool",)).check_evaluation()
    with pytest.raises(UnusableCheck, match=r"hangs: it takes \(text.*and it is called with text:"):
        build_own(tools=("tests.verifier_toy:hangs",)).check_evaluation()


def test_a_function_is_called_behind_a_text_however_it_is_spelled(tmp_path: Path) -> None:
    shown = "<b>no</b>, so <b>yes</b> YES and <b>well</b> WELL"
    data = write(tmp_path, [ROWS[0] | {"rationale": shown}])
    own: dict[str, Any] = {"tools": ("tests.verifier_toy:answers",), "tool_deadline_s": 20.0}
    task = build(data, tool_behind="</b>", **own)
    (demonstration,) = task.demonstrations
    marked = zip(demonstration.completion, demonstration.from_tool, strict=True)
    said = [token for token, by_tool in marked if by_tool]
    assert tokenizer.decode(said) == " YES WELL"
    with pytest.raises(DataError, match="which says ' YES' behind ' so <b>yes</b>'"):
        wrong = [ROWS[0] | {"rationale": "so <b>yes</b> NO"}]
        build(write(tmp_path, wrong), tool_behind="</b>", **own)
    for changes in ({"legal": "so <b>yeslwnad, YESWLAND."}, {"legal": "</b", "stop": ">"}):
        with pytest.raises(TokenizerUnfit, match=r"task\.tool_behind: .* ends '</b>', so the tool"):
            build(write(tmp_path, ROWS[1:]), tool_behind="</b>", **own, **changes)


def test_no_call_of_a_tool_is_late_for_others_before_it(tmp_path: Path) -> None:
    pondering, texts = ("tests.verifier_toy:ponders",), [f" {n} =" for n in range(20)]
    tool = build(write(tmp_path, ROWS[1:]), tools=pondering, tool_deadline_s=1.0).tool
    assert tool is not None

    def said(text: str) -> str:
        try:
            return tokenizer.decode(tool.output(spell(tokenizer, text)))
        except ToolFailed as error:
            return str(error)

    with ThreadPoolExecutor(21) as threads:
        hanging, *others = threads.map(said, [" x =", *texts])
    assert others == texts
    assert "task.tools: tests.verifier_toy:ponders: no answer within 1 s" in hanging


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"x": "Solve:"}, "must hold a column in braces"),
        ({"x": "{question} {answer}"}, "and not the answer"),
        ({"x": "{question.upper}"}, "no plain column"),
        ({"x": "{question"}, "for a brace"),
        ({"y": "Answer:"}, "must hold {answer} once"),
        ({"revision": "main"}, "pattern"),
        ({"min_len": 9, "max_len": 8}, "must not exceed"),
        ({"tools": ("abacus",)}, "there is no tool 'abacus'"),
        ({"tools": ("my:tool",), "tool_behind": ""}, "at least 1 character"),
        ({"tool_behind": "</b>"}, "name one in tools"),
        ({"tools": ("calculator",), "tool_behind": "</b>"}, "name one in tools"),
    ],
)
def test_a_mistake_in_the_settings_is_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        QuestionsConfig.model_validate({"name": "questions", "data": "rows.jsonl"} | changes)


def test_legal_text_and_the_token_that_ends_it(tmp_path: Path) -> None:
    data = write(tmp_path, ROWS[1:])
    digits = build(data, legal="0123456789").actions
    assert {tokenizer.decode([t]) for t in digits.legal_tokens or ()} == set("0123456789")
    with pytest.raises(DataError, match=r"its rationale has '.*', and task\.legal is '0123'"):
        build(write(tmp_path, ROWS, "r.jsonl"), legal="0123")
    anything = build(data).actions.legal_tokens or ()
    assert tokenizer.eos_token_id not in anything and len(anything) > 500
    assert build(data, stop=",").actions.stop_token == spell(tokenizer, ",")[0]
    assert build(data, y=" {answer}").actions.stop_token == tokenizer.eos_token_id
    with pytest.raises(TokenizerUnfit, match=r"task\.stop: .* 'the end, at last'"):
        build(data, stop="the end, at last")


def test_without_a_y_the_policy_is_rewarded_for_what_it_writes_alone(tmp_path: Path) -> None:
    task = build(write(tmp_path, ROWS), y="")
    item = task.reward_query.item(task.prompts[0], [5], np.array([1], dtype=np.int32))
    assert item.answer.tolist() == [tokenizer.eos_token_id] and not task.prompts[0].answer
    rows = [ROWS[0] | {"answer": answer} for answer in (7, "seven", 7)]
    assert len(build(write(tmp_path, rows), y="").prompts) == 2  # as for a verifier they are


def test_a_chat_begins_where_the_template_leaves_off(tmp_path: Path) -> None:
    data = write(tmp_path, ROWS)
    with pytest.raises(TokenizerUnfit, match=r"task\.chat"):
        build(data, chat=True)
    tokenizer.chat_template = "User: {{ messages[0]['content'] }}\nAssistant:"
    try:
        prompt = build(data, chat=True, x="{question}", rationale="none").prompts[0]
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(list(prompt.prompt)) == "User: 3 + 4\nAssistant:"
    assert prompt.text == "3 + 4"


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (" 7.\nQuestion: 2", "7"),
        ("7.0. More", "7"),
        (" 7.5.", "7.5"),
        (" 1,000.", "1000"),
        ("\n", None),
        ("", None),
    ],
)
def test_an_answer_is_read_from_what_the_lm_goes_on_with(
    tmp_path: Path, said: str, answer: str | None
) -> None:
    assert build(write(tmp_path, ROWS), y=": {answer}.\n").parse_answer(said) == answer


def test_an_answer_may_stand_in_braces(tmp_path: Path) -> None:
    task = build(write(tmp_path, ROWS), y=' {{"answer": {answer}}}')
    assert tokenizer.decode(list(task.prompts[0].answer)) == ' {"answer": 7}'
    assert tokenizer.decode(list(task.lead)) == ' {"answer":' and task.end == "}"
    assert task.parse_answer(" 7}\n") == "7"


def test_spellings_of_one_answer_are_equal() -> None:
    assert canonical(" 1,000.0 ") == canonical("$1000") == "1000"
    assert canonical("Not  so ") == "not so" != canonical("so") and canonical("-0") == "0"


def test_odd_numbers_are_told_apart_and_end_nothing() -> None:
    digits = "1234567890123456789012345678901"
    assert canonical(digits) == canonical(f"{digits}.50").removesuffix(".5") == digits
    assert canonical("1e9999999") == "1e9999999" and canonical("-1e999999") == "-1e999999"
    assert canonical("1,2") != canonical("12") and last_number("coords 1,2") == "2"
    assert last_number("$1,234,567.50, or so") == "1234567.5" and canonical("0.00") == "0"


def test_what_is_tested_on_is_not_trained_on(tmp_path: Path) -> None:
    data = write(tmp_path, ROWS)
    tests = write(tmp_path, [*ROWS[:1], {"question": "5 + 5", "answer": 10}], "tests.jsonl")
    with pytest.raises(DataError, match=r"1 records of task\.tests are among those of task\.data"):
        build(data, tests=(tests,))


def test_the_shipped_example_builds() -> None:
    config = load_config(str(PROJECT_ROOT / "tasks/questions.toml")).task
    assert isinstance(config, QuestionsConfig)
    task = build_questions(config, tokenizer)
    assert task.demonstrations and len(task.held_out["test"][0]) == 60


def test_missing_files_are_told_early_and_datasets_are_not() -> None:
    fields = {"name": "questions", "data": "some/sums", "tests": ("none.jsonl", "a/b:test")}
    config = QuestionsConfig.model_validate(fields)
    assert list(missing_files(config)) == [("tests", "none.jsonl")]


def test_verifiers_judge_what_is_written_for_held_out_questions(tmp_path: Path) -> None:
    tests = write(tmp_path, [{"question": "5 + 5", "answer": 10}], "tests.jsonl")
    data = write(tmp_path, ROWS)
    changes = [f"task.data={data}", f'task.tests=["{tests}"]', 'task.y=""', "task.max_len=4"]
    with pytest.raises(ConfigError, match=r'task\.y is "" and reward\.terms have no verifier'):
        load_config("tasks/questions.toml", changes)
    digits = '{kind="verifier", check="regex", pattern="^[-0-9+=, ]*$"}'
    never = '{kind="verifier", check="regex", pattern="x"}'
    more = [f'reward.terms=[{{kind="likelihood"}}, {digits}, {never}]', "evaluation.samples=3"]
    config = load_config("tasks/questions.toml", [*changes, *more])
    found = evaluate(config, adapter=None)
    assert found.value("verified 0") == 1.0 and found.value("verified 1") == 0.0
    (example,) = found.examples
    assert (example.answer, example.truth, example.right) == ("score 1", "10", True)

"""Files of labelled reviews: the form of SUBJ is taken as it is, and every bad line is named."""

import json
from pathlib import Path

import pytest

from tasks.records import DataError
from tasks.subjectivity.data import LabelledReview, load_reviews

GOOD = {"text": "nada .", "label": 1, "label_text": "subjective"}


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_lines_of_subj_are_read_with_or_without_a_last_newline(tmp_path: Path) -> None:
    plot = json.dumps({"text": "a stepfather \u2028 ( neeson ) .", "label": 0}, ensure_ascii=False)
    expected = (
        LabelledReview("nada .", "subjective"),
        LabelledReview("a stepfather \u2028 ( neeson ) .", "objective"),
    )
    for end in ((), ("",)):
        assert load_reviews(write(tmp_path / "a.jsonl", json.dumps(GOOD), plot, *end)) == expected


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"label": 2}, "key 'label'"),
        ({"label": "1"}, "key 'label'"),
        ({"text": " "}, "key 'text' is empty"),
        ({"label_text": "objective"}, "label 1 is 'subjective'"),
        ({"note": ""}, "key 'note'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, changed: dict[str, object], said: str) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps(GOOD), json.dumps(GOOD | changed))
    with pytest.raises(DataError, match=r"a\.jsonl:2: ") as caught:
        load_reviews(path)
    assert said in str(caught.value) and "a.jsonl:1:" not in str(caught.value)


def test_all_bad_lines_are_named_up_to_twenty(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_reviews(write(tmp_path / "a.jsonl", *["{"] * 22))
    said = str(caught.value).split("\n")
    assert [line.split(": ")[0][-9:] for line in said[:2]] == ["a.jsonl:1", "a.jsonl:2"]
    assert said[19].startswith(f"{tmp_path}/a.jsonl:20: not JSON") and said[20] == "... and 2 more"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"])
def test_a_file_without_reviews_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl: (holds no record|not text in UTF-8)"):
        load_reviews(str(tmp_path / "a.jsonl"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="check the path"):
        load_reviews(str(tmp_path / "none.jsonl"))

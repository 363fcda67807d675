"""The enumerable toy: its alphabet, its tool, its shipped language model."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from cluster.config.file import load_config
from lm.config import LMConfig
from lm.model import LanguageModel, load_base
from lm.spelling import TokenizerUnfit
from seed_lm import toy
from tasks.config import ToyConfig
from tasks.registry import build_task
from tasks.task import QuestionTask
from tasks.toy.task import LETTERS, LetterSum

MODEL = Path(toy.__file__).parent.parent / "tasks" / "toy" / "model"


@pytest.fixture(scope="module")
def shipped() -> LanguageModel:
    return load_base(LMConfig(model=str(MODEL), device="cpu"))


def test_every_character_is_one_token(shipped: LanguageModel) -> None:
    text = f"?{LETTERS}=-"
    tokens = shipped.tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) == len(text) and shipped.tokenizer.decode(tokens) == text
    assert len(shipped.tokenizer) == 8


def test_the_shipped_model_is_the_one_that_the_command_makes(tmp_path: Path) -> None:
    toy.make(tmp_path, seed=0)
    again, shipped = (
        AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tmp_path, MODEL)
    )
    assert set(again) == set(shipped)
    assert all((again[name] == shipped[name]).all() for name in again)
    assert (tmp_path / "tokenizer.json").read_text() == (MODEL / "tokenizer.json").read_text()


def test_the_tool_adds_letters_up() -> None:
    tool = LetterSum([10, 11, 12, 13], trigger=20)
    assert tool.triggers == {20}
    assert tool.output((20,)) == []
    assert tool.output((11, 20)) == [11]
    assert tool.output((12, 13, 20)) == [11]  # 2 + 3 = 5 = 1 modulo 4
    assert tool.output((12, 13, 20, 11, 11, 20)) == [13]


@pytest.mark.parametrize("change", ["task.min_len=0", "task.min_len=2", "task.tool=true"])
def test_the_shipped_configuration_builds(change: str, shipped: LanguageModel) -> None:
    config = load_config("tasks/toy.toml", [change])
    task = build_task(config.task, shipped.tokenizer, seed=config.seed)
    assert (task.tool is not None) == (change == "task.tool=true")
    assert task.actions.min_len == (2 if change == "task.min_len=2" else 0)
    assert not isinstance(task, QuestionTask)
    legal = set(task.actions.legal_tokens or ())
    # What Y begins with is no token of Z: X Z Y can be read in one way only.
    assert all(prompt.answer[0] not in legal for prompt in task.prompts)


def test_another_tokenizer_is_refused() -> None:
    with pytest.raises(TokenizerUnfit, match="tasks/toy/model"):
        build_task(ToyConfig(name="toy"), _WithoutLetters(), seed=0)


class _WithoutLetters:
    """A tokenizer that spells each letter as two tokens."""

    eos_token_id: int | None = 0

    def __len__(self) -> int:
        return 8

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1, 2] * len(text)

    def decode(self, token_ids: list[int]) -> str:
        return "-" * len(token_ids)


def test_stop_states_can_be_made_sparse(shipped: LanguageModel) -> None:
    changes = ['task.stop_behind=["b"]', "task.stop_every=2", "task.min_len=1", "task.tool=true"]
    config = load_config("tasks/toy.toml", changes)
    actions = build_task(config.task, shipped.tokenizer, seed=config.seed).actions
    letters = {text: shipped.tokenizer.encode(text)[0] for text in LETTERS}
    assert actions.stop_behind == {letters["b"]} and actions.stop_every == 2
    tokens = [letters[text] for text in "baabb"]
    assert actions.stop_positions(tokens, [False] * 5).tolist() == [1, 5]


def test_a_text_that_no_choice_ends_with_is_refused(shipped: LanguageModel) -> None:
    config = load_config("tasks/toy.toml", ['task.stop_behind=["b "]'])
    with pytest.raises(TokenizerUnfit, match=r"stop_behind: .* ends with 'b '"):
        build_task(config.task, shipped.tokenizer, seed=config.seed)

"""The calculator: two terms, no evaluation, no crash. A text that calls, however it is spelled."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.file import PROJECT_ROOT
from lm.config import LMConfig
from lm.hub import load_tokenizer
from lm.sampling import Request, Sampler
from lm.tools import TriggerText, insertion, is_called
from tasks.arithmetic.calculator import Calculator
from tests.posterior_toy import Magic, Toy
from tests.sampling_toy import CALL, Echo


class CharacterCodec:
    """A tokenizer with one token per character, and one token that ends in '='."""

    eos_token_id: int | None = None
    PIECES = (" =", *(chr(code) for code in range(32, 127)), "\n", "²", "٣", "−")

    def __len__(self) -> int:
        return len(self.PIECES)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.PIECES.index(character) for character in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.PIECES[token] for token in token_ids)


CODEC = CharacterCodec()
CALCULATOR = Calculator(CODEC)


def calculate(text: str) -> str:
    return CODEC.decode(CALCULATOR.output(CODEC.encode(text)))


def test_every_token_that_ends_in_an_equals_sign_asks_the_calculator() -> None:
    assert {CODEC.PIECES[token] for token in CALCULATOR.triggers} == {" =", "="}


@given(st.integers(-9999, 9999), st.sampled_from("+-"), st.integers(-9999, 9999))
def test_two_terms_get_their_result(left: int, operator: str, right: int) -> None:
    result = left + right if operator == "+" else left - right
    assert calculate(f" {left} {operator} {right} =") == f" {result}"
    assert calculate(f" 1 + 1 = 2, {left} {operator} {right} =") == f" {result}"


@pytest.mark.parametrize(
    "text",
    [
        "=",
        " =",
        " 5 =",
        " 6 - 3 - 4 =",
        " 6 - 3 = 3 - 4 =",
        " + 3 =",
        " 6 -",
        " 6 * 3 =",
        " 6 / 0 =",
        " 6 ** 99999 =",
        " 6 3 + 4 =",
        " 6 +  3 =",
        " --6 + 3 =",
        "6 + 3 == ",
        " 06a + 3 =",
        " ² + 3 =",
        " ٣ + 3 =",
        " 6 − 3 =",
        " 1_0 + 3 =",
        " 1234567890 + 1 =",
        f" {'9' * 5000} + 1 =",
        " __import__('os').system('true') + 1 =",
        " 6 + 3,=",
        " 6 +\n3 =",
        "",
    ],
)
def test_what_is_no_sum_of_two_terms_gets_no_output(text: str) -> None:
    assert calculate(text) == ""


@given(st.text(alphabet="0123456789+-=, .e_()\n²٣", max_size=40))
def test_no_text_makes_it_fail_or_write_anything_but_a_number(text: str) -> None:
    output = calculate(text)
    assert output == "" or output.removeprefix(" ").removeprefix("-").isdigit()


TOKENIZER = load_tokenizer(LMConfig(model=str(PROJECT_ROOT / "seed_lm/model")))


def calls(trigger: TriggerText, tokens: list[int]) -> list[str]:
    """What stands there each time that the text is completed."""
    return [
        TOKENIZER.decode(tokens[:length])
        for length in range(1, len(tokens) + 1)
        if tokens[length - 1] in trigger and trigger.completed(tokens[:length])
    ]


@pytest.mark.parametrize("text", ["</search>", "r", " the", ", ", "=", "aa", "é!", "«»", "\n"])
def test_a_text_is_completed_once_however_it_is_spelled(text: str) -> None:
    trigger = TriggerText(TOKENIZER, text)
    for before, behind in itertools.product(("", "an a", "<</search", "é"), ("", " there", ">.")):
        whole = before + text + behind
        bytes_alone = [TOKENIZER.convert_tokens_to_ids(token) for token in _bytes_of(whole)]
        for spelled in (TOKENIZER.encode(whole), bytes_alone):
            assert TOKENIZER.decode(spelled) == whole
            ends = [at for at in range(len(whole) + 1) if whole[:at].endswith(text)]
            # Of two that end in one token only one call comes.
            told = {TOKENIZER.decode(spelled[:n]) for n in range(len(spelled) + 1)}
            expected = {min(t for t in map(len, told) if t >= end) for end in ends}
            found = calls(trigger, spelled)
            assert {len(one) for one in found} == expected, (whole, found)


def _bytes_of(text: str) -> list[str]:
    """Of each byte the token that byte-level tokenizers have for it."""
    pieces = TOKENIZER.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [character for piece, _ in pieces for character in piece]


def test_half_a_character_completes_nothing_and_its_rest_does() -> None:
    trigger, tokens = TriggerText(TOKENIZER, "é"), TOKENIZER.encode("é")
    assert len(tokens) == 2 and [trigger.completed(tokens[:n]) for n in (1, 2)] == [False, True]


def test_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="this one is empty"):
        TriggerText(TOKENIZER, "")


def test_which_tokens_are_a_tools_follows_from_the_tokens_alone() -> None:
    toy, tool = Toy(max_len=12, min_len=8), Magic()
    sampler = Sampler(toy.model, toy.actions, tool, max_rows=64)
    drawn = sampler.sample([Request(prompt=(5, 2))] * 400, torch.Generator().manual_seed(0))
    calls_of = []
    for completion in drawn:
        tokens, marks, number = completion.tokens.tolist(), list[bool](), 0
        while len(marks) < len(tokens):
            marks.append(False)
            said = insertion(tool, tokens[: len(marks)], marks)
            called = tool.is_called(tokens[: len(marks)], marks)
            assert said == (tool.output(tokens[: len(marks)]) if called else [])
            marks += [True] * len(said)
            number += called
        assert marks == completion.from_tool.tolist()
        calls_of.append(number)
    assert max(calls_of) >= 2  # in one completion
    assert [is_called(Echo(), [2, CALL], [False, by_tool]) for by_tool in (False, True)] == [
        True,
        False,
    ]

"""The calculator: two terms, no evaluation, no crash."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.arithmetic.calculator import Calculator


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

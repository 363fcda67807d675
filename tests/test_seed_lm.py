"""The seed LM: its corpus, its tokenizer, its training, and the model that ships."""

import random
from collections import Counter
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lm.config import LMConfig
from lm.model import LanguageModel, load_base
from seed_lm import train as seed_training
from seed_lm.card import stated_loss
from seed_lm.corpus import Share, documents
from seed_lm.random_integers import HIGH, LOW, RandomIntegers
from seed_lm.tokenizer import MAX_VOCAB_SIZE
from seed_lm.train import SHARES, Schedule
from seed_lm.worked_sums import (
    CAREFUL_WRITER,
    OPERATORS,
    SLOPPY_WRITER,
    WorkedSums,
    draw_expression,
    is_held_out,
    report,
    work_out,
)
from tasks.arithmetic.calculator import Calculator
from tasks.arithmetic.expression import Expression, compute, parse_question

MODEL = Path(seed_training.__file__).parent / "model"
MAX_MODEL_BYTES = 8 * 1024 * 1024
SUMS = (Share(WorkedSums(), 1.0),)


@pytest.fixture(scope="module")
def shipped() -> LanguageModel:
    return load_base(LMConfig(model=str(MODEL), device="cpu"))


def expressions(operands: int, count: int) -> list[Expression]:
    rng = random.Random(operands)
    return [draw_expression(operands, rng) for _ in range(count)]


def questions(text: str) -> list[Expression]:
    lines = text.split("\n")
    return [parse_question(line[: line.index("Answer:") + len("Answer:")]) for line in lines]


def test_equal_seeds_write_equal_documents_and_other_seeds_other_ones() -> None:
    first = list(islice(documents(SHARES, "a"), 300))
    assert first == list(islice(documents(SHARES, "a"), 300))
    assert not set(islice(documents(SUMS, "a"), 300)) & set(islice(documents(SUMS, "b"), 5))


def test_the_corpus_asks_two_to_six_operands_and_nothing_that_is_held_out() -> None:
    asked = [q for text in islice(documents(SUMS, "c"), 4000) for q in questions(text)]
    assert {len(question.operands) for question in asked} == {2, 3, 4, 5, 6}
    assert not any(is_held_out(question) for question in asked)


def test_a_fifth_of_all_three_operand_questions_is_held_out() -> None:
    space = [
        Expression(operands, operators)
        for operands in product(range(10), repeat=3)
        for operators in product(OPERATORS, repeat=2)
    ]
    assert len(space) == 4000
    assert sum(is_held_out(expression) for expression in space) / 4000 == pytest.approx(
        0.2, abs=0.02
    )


def test_writers_err_as_they_should() -> None:
    """A careful chain is nearly always right; behind a wrong chain a right answer is rare."""
    rng = random.Random(0)
    for operands in (3, 4, 5):
        asked = expressions(operands, 2000)
        careful = [work_out(one, CAREFUL_WRITER, rng)[-1].result == one.value for one in asked]
        sloppy = [(one, work_out(one, SLOPPY_WRITER, rng)) for one in asked]
        wrong = [(one, steps) for one, steps in sloppy if steps[-1].result != one.value]
        lucky = [
            report([step.result for step in steps], SLOPPY_WRITER, rng) == one.value
            for one, steps in wrong
        ]
        assert sum(careful) / len(careful) > 0.9
        assert len(wrong) / len(sloppy) > 0.7
        assert sum(lucky) / len(lucky) < 0.01


def test_people_neither_draw_uniformly_nor_keep_to_the_range() -> None:
    rng = random.Random(0)
    replies = [RandomIntegers().document(rng).rpartition(":")[2] for _ in range(20_000)]
    allowed = {f" {number}": number for number in range(LOW, HIGH + 1)}
    valid = Counter(allowed[reply] for reply in replies if reply in allowed)
    assert set(valid) == set(allowed.values())
    assert 0.45 < valid.total() / len(replies) < 0.65
    assert valid[37] > 5 * valid[50] > 0


def test_the_tokenizer_gives_every_text_back(shipped: LanguageModel) -> None:
    assert len(shipped.tokenizer) <= MAX_VOCAB_SIZE
    texts = [*islice(documents(SHARES, "d"), 50), "café №7\n\t  x²!?", "Question: 10 - 345", ""]
    for text in texts:
        tokens = shipped.tokenizer.encode(text, add_special_tokens=False)
        assert shipped.tokenizer.decode(tokens) == text
        assert shipped.tokenizer.encode(text) == tokens  # no token is put in front


def test_every_digit_and_every_sign_is_its_own_token(shipped: LanguageModel) -> None:
    text = " 14 - 4 = -4, 0 =, +105."
    tokens = shipped.tokenizer.encode(text)
    pieces = [shipped.tokenizer.decode([token]) for token in tokens]
    assert pieces == [
        *(" 1", "4", " -", " 4", " =", " -", "4", ",", " 0", " =", ",", " +", "1", "0", "5", ".")
    ]


@pytest.mark.parametrize("operator", ["+", "-"])
def test_the_calculator_spells_results_as_the_corpus_does(
    shipped: LanguageModel, operator: str
) -> None:
    tokenizer, calculator = shipped.tokenizer, Calculator(shipped.tokenizer)
    for left, right in product(range(-45, 55), range(10)):
        request = f" {left} {operator} {right} ="
        result = compute(left, "+" if operator == "+" else "-", right)
        for end in (",", "."):
            whole = tokenizer.encode(f"Answer:{request} {result}{end}")
            spoken = calculator.output(tokenizer.encode(request))
            ends = tokenizer.encode(end)
            assert tokenizer.encode(f"Answer:{request}") + spoken + ends == whole


def test_the_shipped_folder_is_small_and_loads_with_plain_transformers() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= MAX_MODEL_BYTES
    expected = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert expected | {"MODEL_CARD.md"} <= {file.name for file in MODEL.iterdir()}
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_the_shipped_tokenizer_is_the_one_that_the_command_trains() -> None:
    tokenizer = seed_training.build_tokenizer(seed=0)
    assert tokenizer.to_str() == Tokenizer.from_file(str(MODEL / "tokenizer.json")).to_str()


def test_the_shipped_model_predicts_as_well_as_its_card_says(shipped: LanguageModel) -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    measured = seed_training.held_out_loss(shipped.model, tokenizer, 0, num_documents=500)
    assert measured == pytest.approx(stated_loss(MODEL / "MODEL_CARD.md"), abs=0.03)


def test_training_again_gives_the_same_losses_and_weights() -> None:
    schedule = Schedule(steps=3, batch_size=8)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    runs = []
    for _ in range(2):
        model = seed_training.build_model(tokenizer, seed=5)
        losses = list(seed_training.train(model, tokenizer, schedule, seed=5))
        runs.append((losses, [weight.detach().clone() for weight in model.parameters()]))
    (losses, weights), (losses_again, weights_again) = runs
    assert losses == losses_again and losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_again, strict=True))

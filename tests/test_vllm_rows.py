"""How rows come, wait for their tools and end behind vLLM, which need not be here for that."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedModel

from actors.protocols import RolloutEngine
from lm.actions import ActionSpace
from lm.sampling import Completion, Request
from lm.tools import Tool, ToolFault
from tests.posterior_toy import Doubling, Magic, Toy
from tests.sampling_toy import (
    CALL,
    MUTE,
    STOP,
    Echo,
    Fragile,
    Slow,
    mixed_requests,
    worst_disagreement,
)
from tests.tiny_lm import save_model
from tests.vllm_toy import engine_of, instead_of_vllm

ACTIONS = ActionSpace(stop_token=STOP, legal_tokens=(2, CALL, MUTE, 5, 9), min_len=1, max_len=9)


@pytest.fixture(scope="module")
def ours() -> Iterator[ModuleType]:
    with instead_of_vllm() as module:
        yield module


@pytest.fixture
def model(tiny_lm: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return tiny_lm("llama")


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    return Path(save_model(model, tmp_path / "model"))


def drain(engine: RolloutEngine, numbers: Sequence[int]) -> dict[int, Any]:
    ended: dict[int, Any] = {}
    deadline_s = time.monotonic() + 60.0
    while len(ended) < len(numbers):
        assert time.monotonic() < deadline_s
        ended |= engine.poll()
    return ended


@pytest.mark.parametrize("max_rows", [4, 40])
@pytest.mark.parametrize("tool", [None, Echo()], ids=["none", "echo"])
def test_what_it_records_is_what_the_learner_computes(
    ours: ModuleType, model: PreTrainedModel, folder: Path, tool: Tool | None, max_rows: int
) -> None:
    engine = engine_of(ours, folder, ACTIONS, tool, max_rows=max_rows)
    requests = mixed_requests(40)
    drawn = engine.sample(requests)
    assert worst_disagreement(model, ACTIONS, requests, drawn) < 1e-4
    assert any(one.from_tool.any() for one in drawn) == (tool is not None)


@pytest.mark.parametrize(
    "toy",
    [Toy(tool=Doubling(), min_len=1, max_len=3), Toy(tool=Magic())],
    ids=["behind a token", "behind a text"],
)
def test_samples_follow_the_exact_distribution_with_a_tool(
    ours: ModuleType, tmp_path: Path, toy: Toy
) -> None:
    count = 1500
    engine = engine_of(
        ours,
        Path(save_model(toy.model, tmp_path, words=6)),
        toy.actions,
        toy.tool,
        max_rows=200,
    )
    drawn = engine.sample([Request(prompt=toy.prompt.prompt)] * count)
    seen = Counter(tuple(one.tokens.tolist()) for one in drawn)
    exact = {z: math.exp(toy.log_q(z, marks)) for z, marks in toy.completions().items()}
    assert seen.keys() <= exact.keys()
    common = {z: p for z, p in exact.items() if p * count >= 5}
    chi2 = sum((seen[z] - p * count) ** 2 / (p * count) for z, p in common.items())
    assert any(one.from_tool.any() for one in drawn)
    assert chi2 < len(common) + 4 * math.sqrt(2 * len(common)), (chi2, len(common))


def test_a_slow_tool_delays_its_own_row_only(
    ours: ModuleType, model: PreTrainedModel, folder: Path
) -> None:
    tool, requests = Slow(), mixed_requests(60)
    engine: Any = engine_of(ours, folder, ACTIONS, tool, max_rows=20)
    numbers, ended = engine.submit(requests), dict[int, Any]()
    for _ in range(60):
        ended |= engine.poll()
    before, steps = list(ended.values()), engine._engine.steps
    assert len(before) > 20 and not any(one.from_tool.any() for one in before)
    started_s = time.monotonic()
    for _ in range(10):  # nothing is left but to wait for tools
        assert engine.poll() == []
    assert time.monotonic() - started_s > 0.09 and engine._engine.steps == steps
    tool.may_speak.set()
    ended |= drain(engine, numbers[len(ended) :])
    completions = [ended[number] for number in numbers]
    assert any(one.from_tool.any() for one in completions)
    assert worst_disagreement(model, ACTIONS, requests, completions) < 1e-4


def test_a_tool_that_fails_ends_its_own_row_and_is_named(
    ours: ModuleType, model: PreTrainedModel, folder: Path
) -> None:
    requests = mixed_requests(240)  # one in twelve or so fails, as threads let it
    engine = engine_of(ours, folder, ACTIONS, Fragile())
    numbers = engine.submit(requests)
    ended = drain(engine, numbers)
    faults = [one for one in ended.values() if isinstance(one, ToolFault)]
    assert {one.reason for one in faults} == {"KeyError: 'nine'"} and 3 < len(faults) < 120
    kept = [n for n, number in enumerate(numbers) if isinstance(ended[number], Completion)]
    whole = [ended[numbers[n]] for n in kept]
    assert worst_disagreement(model, ACTIONS, [requests[n] for n in kept], whole) < 1e-4


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ([3.0], "TypeError: 'float' object cannot be interpreted as an integer"),
        ([2, 31], "ValueError: tool inserted tokens [2, 31], outside the vocabulary of 31"),
        ([7] * 300, "ValueError: a text of "),
    ],
)
def test_what_the_model_cannot_read_ends_the_row(
    ours: ModuleType, folder: Path, said: list[Any], reason: str
) -> None:
    tool: Any = SimpleNamespace(triggers=frozenset({2, CALL, MUTE, 5, 9}), output=lambda _: said)
    engine = engine_of(ours, folder, ACTIONS, tool)
    ended = drain(engine, engine.submit([Request(prompt=(2,))] * 3))
    assert all(one.reason.startswith(reason) for one in ended.values())


def test_a_tool_that_gives_no_answer_in_time_fails(ours: ModuleType, folder: Path) -> None:
    tool = Slow()
    engine = engine_of(ours, folder, ACTIONS, tool, tool_timeout_s=0.1)
    ended = drain(engine, engine.submit(mixed_requests(20))).values()
    tool.may_speak.set()
    reasons = {one.reason for one in ended if isinstance(one, ToolFault)}
    assert reasons == {"TimeoutError: a tool gave no answer within 0.1 s"}


def test_an_error_gives_up_what_was_under_way(ours: ModuleType, folder: Path) -> None:
    tool = Slow()
    engine: Any = engine_of(ours, folder, ACTIONS, tool, max_rows=20)
    engine.submit(mixed_requests(60))
    for _ in range(8):
        engine.poll()
    assert engine._parked and engine._rows
    engine.submit([Request(prompt=(2,), top_p=0.9)])
    with pytest.raises(ValueError, match="top_p"):
        for _ in range(60):
            engine.poll()
    tool.may_speak.set()
    assert not engine._engine.has_unfinished_requests()
    assert len(drain(engine, engine.submit(mixed_requests(9)))) == 9

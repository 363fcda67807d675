"""Completions behind one copy of their prompt: the layout, and that none of them notices."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lm import scoring
from lm.actions import ActionSpace
from lm.packing import pack
from lm.scoring import completion_log_probs
from tests.tiny_lm import ARCHITECTURES

PROMPTS = [(5, 6, 7), (8, 9), (5, 6, 7), (5, 6, 7)]
COMPLETIONS = [[2, 3], [4], [], [3, 3, 3]]


def test_a_group_stands_in_one_row_behind_its_prompt() -> None:
    packing = pack(PROMPTS, COMPLETIONS, shared_width=100)
    assert packing.shared
    assert packing.ids_RW.tolist() == [[5, 6, 7, 2, 3, 3, 3, 3], [8, 9, 4, 0, 0, 0, 0, 0]]
    assert packing.position_RW[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert packing.row_B.tolist() == [0, 1, 0, 0]
    assert packing.column_BS.tolist() == [[2, 3, 4, 4], [1, 2, 2, 2], [2, 2, 2, 2], [2, 5, 6, 7]]
    sees_WW = packing.sees_RWW()[0]
    assert np.flatnonzero(sees_WW[4]).tolist() == [0, 1, 2, 3, 4]
    assert np.flatnonzero(sees_WW[6]).tolist() == [0, 1, 2, 5, 6]
    assert packing.sees_RWW().any(axis=-1).all(), "a column that sees nothing has no softmax"


def test_a_full_row_makes_place_for_another_and_a_wide_text_has_its_own() -> None:
    packing = pack([(1, 1)] * 4, [[2, 2], [3, 3], [4], [5] * 9], shared_width=4)
    assert packing.row_B.tolist() == [0, 0, 1, 2]
    assert packing.ids_RW.shape == (3, 11)
    assert not pack([(1,), (2,)], [[3], [3]], shared_width=4).shared


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_may_be_wider_than_the_longest_text_that_the_model_reads(
    tiny_lm: Callable[[str], PreTrainedModel], architecture: str
) -> None:
    model = tiny_lm(architecture)
    actions = ActionSpace(stop_token=1, legal_tokens=None, min_len=0, max_len=30)
    prompt = [2 + n % 29 for n in range(100)]
    completions = [[2 + (n + k) % 29 for n in range(30)] for k in range(6)]
    marks = [[False] * 30] * 6
    assert pack([prompt] * 6, completions, shared_width=192).ids_RW.shape == (1, 280)
    with torch.no_grad():
        together = completion_log_probs(model, actions, [prompt] * 6, completions, marks)
        for b in range(6):
            one = completion_log_probs(model, actions, [prompt], [completions[b]], [marks[b]])
            torch.testing.assert_close(together.log_pf_BT[b], one.log_pf_BT[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_group_scores_as_its_completions_do_alone(
    tiny_lm: Callable[[str], PreTrainedModel],
    architecture: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_lm(architecture).double()
    actions = ActionSpace(stop_token=1, legal_tokens=None, min_len=0, max_len=12)
    generator = torch.Generator().manual_seed(0)
    prompts = [(5, 6, 7, 8)] * 7 + [(9, 3)] * 5
    lengths = torch.randint(0, 13, (len(prompts),), generator=generator).tolist()
    completions = [torch.randint(2, 31, (n,), generator=generator).tolist() for n in lengths]
    marks = [[False] * n for n in lengths]
    monkeypatch.setattr(scoring, "SHARED_WIDTH", 36)  # so that both groups need several rows
    read = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    together = completion_log_probs(model, actions, prompts, completions, marks)
    assert read[0][0] < len(prompts)
    for b, n in enumerate(lengths):
        one = completion_log_probs(model, actions, [prompts[b]], [completions[b]], [marks[b]])
        # GPT-J attends in float32, whatever its weights are.
        close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
        close(together.log_pf_BT[b, :n], one.log_pf_BT[0])
        close(together.log_stop_BS[b, : n + 1], one.log_stop_BS[0])

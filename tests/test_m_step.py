"""The M-step on the enumerable toy: its loss is the enumerated expectation, and EM never loses.

Every Z of every prompt is known, so q may be the exact posterior: then log p(Y | X), the sum over
all Z, cannot fall in a round (Dempster, Laird and Rubin 1977), and does where the M-step is broken.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.demonstrations import Demonstration, unscored_demonstrations
from actors.prompts import Prompt
from buffer.replay import Group
from cluster.config.file import load_config
from cluster.config.schema import RunConfig
from cluster.config.validation import ConfigError
from cluster.experiments.em import em_steps
from cluster.run.imitation import rationales
from learner.batch import collate
from learner.engine import TorchEngine
from learner.learner import Learner
from learner.objectives.base import ObjectiveInput, ObjectiveValue
from learner.objectives.likelihood import TextLikelihood
from lm.actions import ActionSpace
from lm.adapter import adapter_bytes, save_adapter
from lm.config import LMConfig
from lm.merged import save_merged
from lm.model import LanguageModel, attach_adapter, load_base
from lm.scoring import completion_log_probs
from lm.tools import ToolFault
from tasks.posterior.weights import Completed, log_probs
from tasks.registry import build_task
from tasks.task import Task
from tests.learner_toy import FixedReplay, Published, make_config

ROUNDS_OF_TEXTS = 400  # of the posterior, by largest shares
PATH, SMALL = "tasks/toy.toml", ("task.max_len=2", "lora.rank=4")


@pytest.fixture
def config() -> RunConfig:
    return load_config(PATH, SMALL)


def tuned(config: RunConfig, base: LanguageModel, scale: float) -> Any:
    """The base with an adapter that changes it."""
    model = attach_adapter(base, config.lora, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, scale, generator=generator)
    return model


def completions(task: Task) -> list[tuple[int, ...]]:
    """Every Z that the policy can write."""
    legal, space = task.actions.legal_tokens or (), task.actions
    lengths = range(space.min_len, space.max_len + 1)
    return [z for length in lengths for z in itertools.product(legal, repeat=length)]


def log_joint(model: torch.nn.Module, prompt: Prompt, zs: Sequence[tuple[int, ...]]) -> Tensor:
    """log p(Z Y | X) of each Z by plain passes over whole texts of one length: [N]."""
    found_N: dict[tuple[int, ...], Tensor] = {}
    for length in {len(z) for z in zs}:
        alike = [z for z in zs if len(z) == length]
        text_NT = torch.tensor([[*prompt.prompt, *z, *prompt.answer] for z in alike])
        log_next_NTV = model(input_ids=text_NT).logits.log_softmax(-1)
        places = torch.arange(len(prompt.prompt), text_NT.shape[1])
        log_p_NT = log_next_NTV[:, places - 1].gather(2, text_NT[:, places, None]).squeeze(2)
        found_N |= zip(alike, log_p_NT.sum(1), strict=True)
    return torch.stack([found_N[z] for z in zs])


def log_likelihood(model: torch.nn.Module, task: Task) -> float:
    """Sum over the prompts of log p(Y | X), Z summed over."""
    with torch.no_grad():
        zs = completions(task)
        return sum(log_joint(model, p, zs).logsumexp(0).item() for p in task.prompts)


def counts_of(log_p_N: Tensor) -> NDArray[np.int64]:
    """ROUNDS_OF_TEXTS texts in proportion to p, largest remainders first."""
    share_N = (log_p_N.softmax(0) * ROUNDS_OF_TEXTS).numpy()
    counts_N = np.floor(share_N).astype(np.int64)
    left = ROUNDS_OF_TEXTS - counts_N.sum()
    counts_N[np.argsort(counts_N - share_N)[:left]] += 1
    return counts_N


def texts_of(model: torch.nn.Module, task: Task) -> list[tuple[Prompt, tuple[int, ...], int]]:
    """Prompt, Z and how often it is shown: in proportion to the exact posterior under `model`."""
    zs, found = completions(task), []
    for prompt in task.prompts:
        with torch.no_grad():
            counts_N = counts_of(log_joint(model, prompt, zs))
        found += [(prompt, z, int(c)) for z, c in zip(zs, counts_N, strict=True) if c]
    return found


def whole_texts(task: Task) -> ActionSpace:
    """Any text, as an M-step learns them."""
    stop = task.actions.stop_token
    return ActionSpace(stop_token=stop, legal_tokens=None, min_len=0, max_len=32)


def groups_of(
    task: Task, texts: Sequence[tuple[Prompt, tuple[int, ...], int]], *, backwards: bool = False
) -> list[Group]:
    """As an M-step draws them; with answers turned round where it is broken so."""
    actions = whole_texts(task)
    groups = []
    for prompt, z, count in texts:
        text = (*z, *(prompt.answer[::-1] if backwards else prompt.answer))
        one = Demonstration(prompt=prompt, completion=text, from_tool=(False,) * len(text))
        [shown] = unscored_demonstrations(
            [one], task="toy", actions=actions, is_correct=_no_verdict
        )
        groups.append(Group(prompt_key=prompt.key, fresh=(shown,) * count, replayed=()))
    return groups


def _no_verdict(prompt: Prompt, completion: Sequence[int]) -> None:
    return None


def loss_of(model: torch.nn.Module, task: Task, groups: Sequence[Group]) -> Tensor:
    """The M-step's loss of these texts, as the learner computes it."""
    batch, objective = collate(groups, torch.device("cpu")), TextLikelihood()
    found = completion_log_probs(
        model,
        whole_texts(task),
        [t.prompt.tolist() for t in batch.distinct],
        [t.completion.tolist() for t in batch.distinct],
        [t.from_tool.tolist() for t in batch.distinct],
    )
    value = objective(
        ObjectiveInput(
            log_pf_BT=found.log_pf_BT[batch.row_B],
            log_stop_BS=found.log_stop_BS[batch.row_B],
            log_reward_BS=batch.log_reward_BS,
            stop_BS=batch.stop_BS,
            group_B=batch.group_B,
        )
    )
    return value.total / objective.weight(batch.stop_BS)


def test_loss_and_gradient_equal_the_enumerated_expectation(config: RunConfig) -> None:
    base = load_base(config.lm)
    task = build_task(config.task, base.tokenizer, seed=config.seed)
    texts = texts_of(base.model, task)
    model = tuned(config, base, 0.1)
    found = loss_of(model, task, groups_of(task, texts))
    terms = [count * log_joint(model, prompt, [z])[0] for prompt, z, count in texts]
    expected = -torch.stack(terms).sum() / (ROUNDS_OF_TEXTS * len(task.prompts))
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-6)
    adapter = [p for p in model.parameters() if p.requires_grad]
    for mine, brute in zip(
        torch.autograd.grad(found, adapter), torch.autograd.grad(expected, adapter), strict=True
    ):
        assert brute.abs().max() > 1e-4
        torch.testing.assert_close(mine, brute, rtol=1e-4, atol=1e-6)


class Upwards(TextLikelihood):
    """Broken: makes the texts less likely."""

    def __call__(self, batch: ObjectiveInput) -> ObjectiveValue:
        value = super().__call__(batch)
        return ObjectiveValue(total=-value.total, row_sums=value.row_sums)


def m_step(config: RunConfig, folder: Path, *, broken: str = "") -> tuple[float, float]:
    """log p(Y | X) before and after one M-step with exact posteriors; leaves the LM in a folder."""
    base = load_base(config.lm)
    task = build_task(config.task, base.tokenizer, seed=config.seed)
    before = log_likelihood(base.model, task)
    texts = texts_of(base.model, task)
    model = attach_adapter(base, config.lora, seed=1)
    settings = make_config(learning_rate=4e-3, weight_decay=0.0, warmup_steps=0)
    learner = Learner(
        model=model,
        actions=whole_texts(task),
        replay=FixedReplay(groups_of(task, texts, backwards=broken == "answers")),
        engine=TorchEngine(model, settings),
        objective=Upwards() if broken == "sign" else TextLikelihood(),
        config=settings,
        weights=Published(),
        rng=np.random.default_rng(0),
    )
    for _ in range(12):
        learner.step()
    save_merged(config.lm, adapter_bytes(model), folder)
    return before, log_likelihood(load_base(LMConfig(model=str(folder))).model, task)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """log p(Y | X) before and after each of two rounds, and the LM that they leave."""
    folder, config = tmp_path_factory.mktemp("em"), load_config(PATH, SMALL)
    likelihoods: list[float] = []
    for number in range(2):
        likelihoods += m_step(config, folder / str(number))
        config = config.changed({"lm.model": str(folder / str(number))})
    return likelihoods, folder / "1"


def test_the_likelihood_of_the_answers_does_not_fall_in_a_round(
    rounds: tuple[list[float], Path],
) -> None:
    (first, second, again, third), _ = rounds
    assert again == pytest.approx(second)  # the next round begins with what the last one left
    assert first < second - 1.0 and second < third - 0.1


@pytest.mark.parametrize("broken", ["sign", "answers"])
def test_and_falls_where_the_m_step_is_broken(
    rounds: tuple[list[float], Path], tmp_path: Path, broken: str
) -> None:
    config = load_config(PATH, SMALL).changed({"lm.model": str(rounds[1])})
    before, after = m_step(config, tmp_path / "model", broken=broken)
    assert after < before - 1.0


def test_rationales_are_the_policys_in_front_of_the_answers(
    config: RunConfig, tmp_path: Path
) -> None:
    base = load_base(config.lm)
    task = build_task(config.task, base.tokenizer, seed=config.seed)
    model = tuned(config, base, 0.3)
    save_adapter(model, tmp_path / "adapter", base.fingerprint)
    asked = load_config(
        PATH,
        [*SMALL, 'learner.objective="joint"', "em.rationales=2000",
         f"em.policy={tmp_path / 'adapter'}"],
    )  # fmt: skip
    shown = list(rationales(asked, task))
    assert len(shown) == 2000 * len(task.prompts)
    for prompt in task.prompts:
        of_prompt = [text for text in shown if text.prompt.key == prompt.key]
        assert all(t.completion[-len(prompt.answer) :] == prompt.answer for t in of_prompt)
        drawn = Counter(t.completion[: -len(prompt.answer)] for t in of_prompt)
        zs = completions(task)
        marks = [Completed(tokens=z, from_tool=(False,) * len(z)) for z in zs]
        share_N = np.array([drawn[z] for z in zs]) / len(of_prompt)
        q_N = np.exp(log_probs(model, task.actions, prompt, marks))
        assert q_N.sum() == pytest.approx(1.0, abs=1e-4)
        assert 0.5 * np.abs(share_N - q_N).sum() < 0.06


def test_a_rationale_that_a_tool_ended_is_left_out(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build_task(config.task, load_base(config.lm).tokenizer, seed=config.seed)
    fault, z = ToolFault(KeyError("nine")), SimpleNamespace(tokens=np.array([4]))
    drawn: list[list[Any]] = [[z, fault] for _ in task.prompts]
    policy = SimpleNamespace(attempt=lambda *_, **__: drawn)
    monkeypatch.setattr("cluster.run.imitation.evaluation_context", lambda *_, **__: policy)
    shown = [(one.prompt.key, one.completion) for one in rationales(config, task)]
    assert shown == [(prompt.key, (4, *prompt.answer)) for prompt in task.prompts]
    drawn[:] = [[fault, fault] for _ in task.prompts]
    with pytest.raises(KeyError, match="nine"):
        list(rationales(config, task))


def test_a_merged_lm_is_the_base_with_its_adapter(config: RunConfig, tmp_path: Path) -> None:
    base = load_base(config.lm)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    plain = base.model(ids).logits
    model = tuned(config, base, 0.1)
    expected = model(ids).logits
    for _ in range(2):  # a folder that is there is replaced
        save_merged(config.lm, adapter_bytes(model), tmp_path / "model")
    merged = load_base(LMConfig(model=str(tmp_path / "model")))
    torch.testing.assert_close(merged.model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=0.01)
    assert merged.tokenizer.encode("ab?") == base.tokenizer.encode("ab?")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_each_step_of_em_begins_with_what_the_last_one_left() -> None:
    told = ["learner.steps=7", 'em.overrides=["learner.steps=3"]', "learner.subtb_lambda=0.9"]
    shared = load_config(PATH, told)
    steps = list(em_steps(shared, rounds=2, name=lambda kind, number: f"em-{kind}{number}"))
    assert [step.title for step in steps] == ["E-step 1", "M-step 1", "E-step 2", "M-step 2"]
    e1, m1, e2, m2 = (step.config for step in steps)
    assert [c.learner.objective for c in (e1, m1, e2, m2)] == ["subtb", "joint", "subtb", "joint"]
    assert [c.learner.steps for c in (e1, m1, e2, m2)] == [7, 3, 7, 3]
    assert e1.lm == m1.lm and e2.lm == m2.lm
    assert e2.lm.model.endswith("em-M1/model")
    assert str(m1.em.policy).endswith("em-E1/adapter")
    assert str(m2.em.policy).endswith("em-E2/adapter")
    assert m1.rollout_actors == m1.reward_replicas == 0


@pytest.mark.parametrize(
    ("path", "overrides", "said"),
    [
        (PATH, [], "name the folder of its adapter in em.policy"),
        ("tasks/arithmetic.toml", ["em.policy=runs/a"], "tasks with EM are subjectivity, toy"),
    ],
)
def test_an_m_step_that_cannot_be_is_refused(path: str, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(path, [*overrides, "learner.objective=joint"])

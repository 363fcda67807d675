"""What rounding explains and what it does not: in float32, in bfloat16, and over 2,000 tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer

from buffer.replay import Group
from buffer.trajectory import Trajectory
from cluster.config.project import PROJECT_ROOT
from learner.agreement.comparison import Comparison, Gap, compare, pair_of
from learner.agreement.gate import AgreementGate
from learner.agreement.policy_history import PastPolicies
from learner.agreement.quarantine import Quarantine, read_quarantine
from learner.agreement.tolerance import Rounding, Tolerance, rounding_of
from lm.actions import ActionSpace
from lm.adapter import adapter_bytes, load_adapter_bytes
from lm.config import LMConfig, LoRAConfig
from lm.model import attach_adapter, load_base
from lm.sampling import Request, Sampler
from tests.gate_toy import QueueReplay, as_group, draw
from tests.learner_toy import make_config, make_policy, make_trajectory

LENGTH = 16
FINE = Rounding(floor_nats=3e-5, bound_nats=1e-3)
ROUGH = Rounding(floor_nats=1e-2, bound_nats=0.25)
# Log q of SmolLM2-135M-Instruct in bfloat16, recomputed in one pass less sampled with a cache, of
# two completions of 2,000 tokens each behind web text, in thousandths of a nat.
MEASURED = Path(__file__).parent / "bfloat16_differences.npy"


def differing(differences_D: np.ndarray, *, actor: str = "a0") -> Comparison:
    """A comparison with these differences, one for each decision."""
    tokens = differences_D.size - 1
    trajectory = make_trajectory(
        "short",
        (1,),
        completion=np.ones(tokens, dtype=np.int32),
        stops=np.array([tokens], dtype=np.int32),
        from_tool=np.zeros(tokens, dtype=np.bool_),
        behaviour_log_prob=np.zeros(tokens, dtype=np.float32),
        actor=actor,
    )
    return Comparison(
        trajectory=trajectory,
        learner_version=0,
        rms_nats=float(np.sqrt((differences_D**2).mean())),
        mean_nats=float(differences_D.mean()),
    )


def test_the_statistics_are_those_of_chosen_tokens_and_stop_states() -> None:
    model = make_policy()
    actions = ActionSpace(stop_token=0, legal_tokens=(1, 2), min_len=1, max_len=4)
    recorded = np.array([-0.5, -0.25, 0.0, -0.125], dtype=np.float32)
    from_tool = np.array([False, False, True, False])
    stops = actions.stop_positions((1, 2, 2, 1), from_tool)
    trajectory = make_trajectory(
        "long",
        (1, 2, 2, 1),
        from_tool=from_tool,
        stops=stops,
        log_reward=np.zeros(len(stops), dtype=np.float32),
        behaviour_log_prob=recorded,
        behaviour_log_stop=np.full(len(stops), -0.75, dtype=np.float32),
    )
    (outcome,) = compare(model, actions, [trajectory], learner_version=0, token_budget=99)
    differences = np.concatenate(
        [(outcome.log_q_token - recorded)[~from_tool], outcome.log_q_stop + 0.75]
    ).astype(float)
    assert outcome.decisions == differences.size == 3 + len(stops)
    assert outcome.rms_nats == pytest.approx(np.sqrt((differences**2).mean()), rel=1e-6)
    assert outcome.mean_nats == pytest.approx(differences.mean(), rel=1e-6)


def test_the_rounding_expected_follows_the_precision_of_the_weights() -> None:
    model = make_policy()
    assert rounding_of(model) == FINE
    assert rounding_of(model.to(torch.bfloat16)) == ROUGH


def test_a_minority_of_damaged_actors_does_not_shift_the_scale() -> None:
    rng = np.random.default_rng(0)
    tolerance = Tolerance(ROUGH)
    of_actors = [
        differing(rng.normal(0, scale, 400), actor=f"a{index}")
        for index, scale in enumerate((0.03, 0.2, 0.03))
    ]
    tolerance.calibrate(of_actors)
    assert [tolerance.admits(outcome) for outcome in of_actors] == [True, False, True]


def test_errors_of_one_sign_are_held_closer_than_errors_that_cancel() -> None:
    tolerance = Tolerance(ROUGH)
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, 2000)
    tolerance.calibrate([differing(noise)])
    assert tolerance.admits(differing(1.5 * rng.permutation(noise)))
    assert not tolerance.admits(differing(noise + 0.05))
    assert "in the mean" in tolerance.excess(differing(noise + 0.05))


@pytest.mark.parametrize(("decisions", "draws"), [(500, 1), (250, 2), (10, 3)])
def test_draws_are_learned_from_until_they_have_shown_enough_and_at_most_three(
    decisions: int, draws: int
) -> None:
    tolerance = Tolerance(ROUGH)
    learned = 0
    while tolerance.calibrating:
        tolerance.calibrate([differing(np.full(decisions, 0.05))])
        learned += 1
    assert learned == draws


def test_what_is_beyond_the_bound_does_not_count_as_shown() -> None:
    tolerance = Tolerance(ROUGH)
    tolerance.calibrate([differing(np.full(10_000, 9.0))])
    assert tolerance.calibrating


def test_what_is_configured_is_the_tolerance_and_nothing_is_learned() -> None:
    tolerance = Tolerance(FINE, fixed_nats=0.5)
    assert not tolerance.calibrating
    assert tolerance.admits(differing(np.full(2000, 0.49)))
    assert not tolerance.admits(differing(np.full(2000, 0.51)))


def test_honest_bfloat16_passes_at_2000_tokens_though_its_largest_gap_has_grown() -> None:
    measured_RT = np.load(MEASURED).astype(float) / 1000
    short_rows = measured_RT.reshape(-1, 25)[:6]
    tolerance = Tolerance(ROUGH)
    tolerance.calibrate(map(differing, short_rows))
    rng = np.random.default_rng(0)
    # Neighbouring tokens round alike: whole stretches of 50 are drawn.
    blocks = measured_RT.reshape(-1, 50)
    honest = [blocks[rng.integers(len(blocks), size=40)].ravel() for _ in range(200)]
    assert all(tolerance.admits(differing(row_D)) for row_D in honest)
    assert all(
        tolerance.admits(differing(row_T[start : start + size]))
        for row_T in measured_RT
        for size in (5, 20, 100, 500)
        for start in range(0, 2000, size)
    )
    largest = [np.median([np.abs(row_D).max() for row_D in rows]) for rows in (short_rows, honest)]
    assert largest[1] > 1.5 * largest[0]


def layer_damaged(model: Any) -> None:
    layer = next(p for n, p in model.named_parameters() if "layers.1." in n and p.ndim > 1)
    with torch.no_grad():
        layer.add_(layer.std() * torch.randn_like(layer))


def scale_doubled(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {name: 2 * scale for name, scale in module.scaling.items()}


class Actor:
    """Samples of the shipped LM, as an actor of this name records them."""

    def __init__(self, name: str, dtype: str, seed: int) -> None:
        base = load_base(LMConfig(model=str(PROJECT_ROOT / "seed_lm/model"), dtype=dtype))
        self.name, self.tokenizer = name, base.tokenizer
        self.model = attach_adapter(base, LoRAConfig(rank=4, alpha=8.0), seed=1)
        stop = base.tokenizer.encode(".", add_special_tokens=False)[0]
        self.actions = ActionSpace(
            stop_token=stop, legal_tokens=None, min_len=LENGTH - 4, max_len=LENGTH
        )
        self._generator = torch.Generator().manual_seed(seed)
        self.temperature = 1.0  # of its softmax, which it believes to be 1

    def group(self, version: int, size: int) -> tuple[Trajectory, ...]:
        prompt = tuple(self.tokenizer.encode("It was a", add_special_tokens=False))
        sampler = Sampler(self.model, self.actions, None, max_rows=size)
        request = Request(prompt=prompt)
        with scaled_logits(self.model, 1 / self.temperature):
            drawn = sampler.sample([request] * size, self._generator)
        return tuple(
            make_trajectory(
                "short",
                z.tokens.tolist(),
                prompt=np.array(prompt, dtype=np.int32),
                stops=z.stops,
                log_reward=np.zeros(len(z.stops), dtype=np.float32),
                behaviour_log_prob=z.log_q_token,
                behaviour_log_stop=z.log_q_stop,
                policy_version=version,
                actor=self.name,
            )
            for z in drawn
        )


class scaled_logits:
    """The head's outputs are multiplied inside."""

    def __init__(self, model: Any, factor: float) -> None:
        self._head, self._factor = model.get_output_embeddings(), factor

    def __enter__(self) -> None:
        self._hook = self._head.register_forward_hook(
            lambda _module, _inputs, logits: logits * self._factor
        )

    def __exit__(self, *_error: object) -> None:
        self._hook.remove()


def hotter(actor: Actor) -> None:
    actor.temperature = 1.25


def stale(actor: Actor) -> None:
    """It goes on with the adapter that it has."""
    actor.load = lambda adapter: None  # type: ignore[attr-defined]


DAMAGES: dict[str, Callable[[Actor], None]] = {
    "none": lambda actor: None,
    "layer": lambda actor: layer_damaged(actor.model),
    "scale": lambda actor: scale_doubled(actor.model),
    "temperature": hotter,
    "stale": stale,
}


def moved(model: Any, seed: int, scale: float = 0.05) -> bytes:
    """The adapter after a few steps; its bytes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return adapter_bytes(model)


def gate_of(learner: Actor, folder: Path) -> AgreementGate:
    return AgreementGate(
        replay=QueueReplay(),
        model=learner.model,
        actions=learner.actions,
        past=PastPolicies(learner.model, max_age=9),
        quarantine=Quarantine(folder),
        config=make_config(agreement_max_share=1.0),
        warn=print,
    )


def learn_from(gate: AgreementGate, learner: Actor, groups: Sequence[Group], version: int) -> None:
    """Let the gate hear what the learner's own pass has shown, under the weights of now."""
    trajectories = [t for group in groups for t in group.fresh]
    found = compare(
        learner.model, learner.actions, trajectories, learner_version=version, token_budget=4096
    )
    gaps: dict[tuple[str, int], Gap] = {}
    for pair in {pair_of(t) for t in trajectories}:
        own = [outcome for outcome in found if pair_of(outcome.trajectory) == pair]
        weights = [outcome.decisions for outcome in own]
        squares = np.average([outcome.rms_nats**2 for outcome in own], weights=weights)
        mean = np.average([outcome.mean_nats for outcome in own], weights=weights)
        gaps[pair] = Gap(sum(weights), float(np.sqrt(squares)), float(mean))
    gate.hear(groups, gaps, version)


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_who_agreed_for_long_and_is_damaged_now_is_named_long_before_it_is_due(
    damage: str, lag: int, tmp_path: Path
) -> None:
    learner = Actor("learner", "float32", seed=9)
    actors = [Actor(f"actor-{index}", "float32", seed=index) for index in range(2)]
    gate, adapters, drawn = gate_of(learner, tmp_path), [], 0
    gate.tolerance.restore({"draws": 3, "squares": {}})
    record = {"since": 0, "last": 0, "gap": 20, "heard": 0.0, "changed": False}
    gate.schedule.restore([], {actor.name: dict(record) for actor in actors})
    moved(learner.model, 99, scale=0.2)
    for version in range(1, 14):
        adapters.append(moved(learner.model, version, scale=0.02))
        gate.keep(version, adapters[-1])
        if version < 6:
            for actor in actors:
                load_adapter_bytes(actor.model, adapters[-1])
            continue
        if version == 8:
            DAMAGES[damage](actors[1])
        sampled_at = version - lag
        for actor in actors:
            load = getattr(actor, "load", lambda data, a=actor: load_adapter_bytes(a.model, data))
            load(adapters[sampled_at - 1])
        groups = [as_group(actor.group(sampled_at, 5)) for actor in actors]
        admitted = draw(gate, QueueReplay(*groups, *groups), version, 2)
        drawn += 5 * (version >= 8)
        learn_from(gate, learner, admitted, version)
        wrong = list(read_quarantine(tmp_path))
        if wrong:
            break
    assert {outcome.trajectory.actor for outcome in wrong} == (
        set() if damage == "none" else {"actor-1"}
    )
    assert damage == "none" or drawn <= 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_within_20_trajectories_and_nobody_else_is(
    damage: str, dtype: str, tmp_path: Path
) -> None:
    learner = Actor("learner", dtype, seed=9)
    actors = [Actor(f"actor-{index}", dtype, seed=index) for index in range(2)]
    gate = gate_of(learner, tmp_path)
    for version in range(6):
        adapter = moved(learner.model, version)
        gate.keep(version, adapter)
        if version == 3:
            DAMAGES[damage](actors[1])
        for actor in actors:
            getattr(actor, "load", lambda data, a=actor: load_adapter_bytes(a.model, data))(adapter)
        groups = [as_group(actor.group(version, 5)) for actor in actors]
        draw(gate, QueueReplay(*groups, *groups), version, 2)
        if version < 3:
            assert gate.metrics()["agreement/quarantined"] == 0
    wrong = list(read_quarantine(tmp_path))
    assert {outcome.trajectory.actor for outcome in wrong} == (
        set() if damage == "none" else {"actor-1"}
    )

"""The agreement gate: what it compares, what it takes out, and that it leaves no other trace."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from buffer.replay import BufferStarved, DrawRequest
from buffer.trajectory import Trajectory
from learner.agreement.comparison import compare, num_decisions
from learner.agreement.policy_history import PastPolicies
from learner.agreement.quarantine import read_quarantine
from learner.agreement.tolerance import SamplersDisagree
from learner.broadcast import Unrecoverable
from learner.engine import Engine, TorchEngine
from lm.adapter import adapter_bytes
from tests.gate_toy import QueueReplay, ToySampler, as_group, draw, make_gate
from tests.learner_toy import (
    ACTIONS,
    PROMPTS,
    Published,
    adapter_of,
    make_config,
    make_learner,
    make_policy,
    make_trajectory,
)
from tests.ranks import run_ranks

STEPS = 4


def shake(model: Any, seed: int, scale: float = 0.3) -> bytes:
    """Other adapter weights, as a step would leave them; their bytes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_of(model):
            model.get_parameter(parameter).add_(
                scale * torch.randn(model.get_parameter(parameter).shape, generator=generator)
            )
    return adapter_bytes(model)


def recorded_off_by(gap: float, trajectory: Trajectory) -> Trajectory:
    """The same, but for its first stop state; `gap` is the root mean square over all decisions."""
    log_q_stop = trajectory.behaviour_log_stop.copy()
    log_q_stop[0] -= gap * num_decisions(trajectory) ** 0.5
    return make_trajectory(
        trajectory.prompt_key,
        trajectory.completion.tolist(),
        behaviour_log_prob=trajectory.behaviour_log_prob,
        behaviour_log_stop=log_q_stop,
        policy_version=trajectory.policy_version,
        actor=trajectory.actor,
    )


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_was_sampled_at_a_version_agrees_however_many_later_it_is_drawn(
    tmp_path: Path,
) -> None:
    model, sampler = make_policy(), ToySampler("actor-0")
    gate = make_gate(model, tmp_path)
    groups = []
    for version in range(6):
        adapter = shake(model, seed=version)
        gate.keep(version, adapter)
        if version in (0, 3):
            sampler.load(adapter)
            groups += [sampler.group(key, version=version) for key in PROMPTS]
    admitted = draw(gate, QueueReplay(*map(as_group, groups)), 5, len(groups))
    assert [group.fresh for group in admitted] == groups
    metrics = gate.metrics()
    assert metrics["agreement/admitted_max_nats"] < 1e-4
    assert metrics["agreement/checked"] >= 2
    assert metrics["agreement/checked"] + metrics["agreement/vouched"] == 4 * len(groups)
    assert (metrics["agreement/unchecked"], metrics["agreement/quarantined"]) == (0, 0)
    # Under the weights of now the old ones are far off: it was the version that was put back.
    now = compare(model, ACTIONS, groups[0], learner_version=5, token_budget=999)
    assert min(outcome.rms_nats for outcome in now) > 0.05


def test_samplers_are_held_to_the_weights_that_they_were_sent_rounded_or_not(
    tmp_path: Path,
) -> None:
    model, sampler = make_policy(), ToySampler("actor-0")
    shake(model, seed=0, scale=1.0)
    rounded = adapter_bytes(model, torch.bfloat16)
    sampler.load(rounded)
    groups = [sampler.group(key, version=3) for key in PROMPTS]
    gaps = {}
    for dtype in ("float32", "bfloat16"):
        config = make_config(publish_dtype=dtype, agreement_tolerance_nats=9.0)
        gate = make_gate(model, tmp_path, config=config)
        gate.keep(3, rounded)
        draw(gate, QueueReplay(*map(as_group, groups)), 3, len(groups))
        gaps[dtype] = gate.metrics()["agreement/admitted_max_nats"]
    assert gaps["bfloat16"] < 1e-4 < 1e-3 < gaps["float32"]


def test_every_trajectory_of_a_damaged_actor_is_taken_out_and_none_of_the_others(
    tmp_path: Path,
) -> None:
    model = make_policy()
    warnings: list[str] = []
    gate = make_gate(model, tmp_path, warnings=warnings)
    honest, damaged = ToySampler("actor-0"), ToySampler("actor-1", seed=1, damage=0.1)
    for version in (0, 1):
        adapter = shake(model, seed=version)
        gate.keep(version, adapter)
        for sampler in (honest, damaged):
            sampler.load(adapter)
    # One group is mixed, as replay mixes; two of the damaged actor are at two versions.
    bad = damaged.group("short", version=1) + damaged.group("long", version=0)
    good = honest.group("short", version=1) + honest.group("other", version=1)
    replay = QueueReplay(
        as_group(bad[:4], replayed=good[:1]),
        as_group(good[:4], replayed=bad[4:6]),
        as_group(good[4:]),
        as_group(bad[6:]),
    )
    admitted = draw(gate, replay, 1, 2)
    assert [group.fresh for group in admitted] == [good[:4], good[4:]]
    assert not any(group.replayed for group in admitted)
    assert replay.discarded == list(bad[4:6])
    # The first draw brought a bad and a good group, and what came instead of the bad one agreed.
    assert gate.metrics()["agreement/quarantined"] == 6
    assert {t.completion.tobytes() for t in bad[:6]} == {
        outcome.trajectory.completion.tobytes() for outcome in read_quarantine(tmp_path)
    }
    assert min(outcome.rms_nats for outcome in read_quarantine(tmp_path)) > 1e-3
    assert [line.split(" at version")[0].split()[-1] for line in warnings] == ["actor-1"] * 2
    assert "0001.records" in warnings[0] and "0.001 are tolerated" in warnings[0]


def test_below_the_tolerance_nothing_happens_and_above_it_only_the_wrong_one_goes(
    tmp_path: Path,
) -> None:
    model = make_policy()
    config = make_config(agreement_tolerance_nats=0.01, agreement_check_share=1.0)
    gate = make_gate(model, tmp_path, config=config)
    gate.keep(0, adapter_bytes(model))
    group = ToySampler("actor-0").group("long", version=0)
    noisy = tuple(recorded_off_by(0.009, t) for t in group)
    assert draw(gate, QueueReplay(as_group(noisy)), 0, 1)[0].fresh == noisy
    assert gate.metrics()["agreement/admitted_max_nats"] == pytest.approx(0.009, abs=1e-4)
    mixed = (*noisy[:3], recorded_off_by(0.011, group[3]))
    assert draw(gate, QueueReplay(as_group(mixed)), 0, 1)[0].fresh == noisy[:3]
    assert gate.metrics()["agreement/checked"] == 4
    (kept,) = read_quarantine(tmp_path)
    assert kept.rms_nats == pytest.approx(0.011, abs=1e-4)
    np.testing.assert_allclose(kept.log_q_stop, group[3].behaviour_log_stop, atol=1e-5)
    np.testing.assert_allclose(kept.log_q_token, group[3].behaviour_log_prob, atol=1e-5)


def test_one_that_is_wrong_has_all_of_its_actor_compared_and_condemns_only_itself(
    tmp_path: Path,
) -> None:
    model = make_policy()
    gate = make_gate(model, tmp_path)
    for version in (0, 1):
        gate.keep(version, adapter_bytes(model))
    sampler, other = ToySampler("actor-0"), ToySampler("actor-1", seed=1)
    old, new, others = (
        sampler.group("long", version=0),
        sampler.group("long", version=1, size=8),
        other.group("long", version=1),
    )
    # Of each group the longest, the last of them, is looked at first.
    wrong = sorted(new, key=lambda trajectory: trajectory.completion.size)[-1]
    drawn = tuple(recorded_off_by(0.5, t) if t is wrong else t for t in new)
    replay = QueueReplay(as_group(drawn, replayed=old), as_group(others))
    admitted, _ = draw(gate, replay, 1, 2)
    assert admitted.fresh == tuple(t for t in new if t is not wrong)
    assert admitted.replayed == old
    metrics = gate.metrics()
    assert (metrics["agreement/checked"], metrics["agreement/vouched"]) == (8 + 4 + 1, 3)
    assert metrics["agreement/quarantined"] == 1


def test_a_version_that_is_gone_counts_as_unchecked_and_never_as_agreeing(tmp_path: Path) -> None:
    model = make_policy()
    gate = make_gate(model, tmp_path, max_age=2)
    damaged = ToySampler("actor-1", damage=0.1)
    for version in range(4):
        gate.keep(version, adapter_bytes(model))
    old = damaged.group("short", version=0)
    assert draw(gate, QueueReplay(as_group(old)), 3, 1)[0].fresh == old
    metrics = gate.metrics()
    assert (metrics["agreement/checked"], metrics["agreement/vouched"]) == (0, 0)
    assert metrics["agreement/unchecked"] == 4
    assert "agreement/admitted_max_nats" not in metrics


def test_who_was_wrong_at_a_version_stays_wrong_when_that_version_is_gone(tmp_path: Path) -> None:
    model = make_policy()
    gate = make_gate(model, tmp_path, max_age=2)
    gate.keep(0, adapter_bytes(model))
    damaged, honest = ToySampler("actor-1", damage=0.1), ToySampler("actor-0")
    first, again = damaged.group("short", version=0), damaged.group("short", version=0)
    fine = honest.group("short", version=0)
    draw(gate, QueueReplay(as_group(first), as_group(fine)), 0, 1)
    for version in range(1, 5):
        gate.keep(version, adapter_bytes(model))
    new = honest.group("long", version=4)
    replay = QueueReplay(as_group(new, replayed=(*again[:2], fine[0])))
    (admitted,) = draw(gate, replay, 4, 1)
    assert (admitted.fresh, admitted.replayed) == (new, (fine[0],))
    assert replay.discarded == list(again[:2])
    assert gate.metrics()["agreement/quarantined"] == 2
    assert gate.metrics()["agreement/unchecked"] == 3
    assert [np.isnan(outcome.rms_nats) for outcome in read_quarantine(tmp_path)][-2:] == [True] * 2


def test_what_only_replay_brings_is_compared_once_for_each_actor_and_version(
    tmp_path: Path,
) -> None:
    model = make_policy()
    gate = make_gate(model, tmp_path, config=make_config(agreement_check_share=0.0))
    for version in (0, 1):
        gate.keep(version, adapter_bytes(model))
    old = ToySampler("actor-1").group("short", version=0)
    for expected in (2, 0):
        new = ToySampler("actor-0").group("short", version=1)
        draw(gate, QueueReplay(as_group(new, replayed=old)), 1, 1)
        metrics = gate.metrics()
        assert (metrics["agreement/checked"], metrics["agreement/vouched"]) == (
            expected,
            8 - expected,
        )


def test_demonstrations_pass_and_are_not_counted(tmp_path: Path) -> None:
    model = make_policy()
    gate = make_gate(model, tmp_path)
    gate.keep(0, adapter_bytes(model))
    taught = make_trajectory("short", (1, 2), behaviour="demonstration")
    group = as_group(ToySampler("actor-0").group("short", version=0), replayed=(taught,))
    (admitted,) = draw(gate, QueueReplay(group), 0, 1)
    assert admitted.replayed == (taught,)
    metrics = gate.metrics()
    assert metrics["agreement/checked"] + metrics["agreement/vouched"] == 4
    assert metrics["agreement/unchecked"] == 0


def test_a_recomputation_that_is_not_a_number_is_no_agreement(tmp_path: Path) -> None:
    model = make_policy()
    gate = make_gate(model, tmp_path)
    group = ToySampler("actor-0").group("short", version=0)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    gate.keep(0, adapter_bytes(model))
    with pytest.raises(BufferStarved):
        draw(gate, QueueReplay(as_group(group)), 0, 1)
    assert gate.metrics()["agreement/quarantined"] == 4


def test_past_the_share_the_error_names_actor_versions_gap_tolerance_and_file(
    tmp_path: Path,
) -> None:
    model = make_policy()
    gate = make_gate(model, tmp_path)
    honest, damaged = ToySampler("actor-0"), ToySampler("actor-1", seed=1, damage=0.1)
    groups = []
    for version in range(3):
        adapter = shake(model, seed=version)
        gate.keep(version, adapter)
        for sampler in (honest, damaged):
            sampler.load(adapter)
            groups += [sampler.group("long", version=version, size=8) for _ in range(4)]
    replay = QueueReplay(*map(as_group, groups))
    # 16 of 32 + 16 wrong are too few to judge by; the next draws bring more.
    draw(gate, replay, 2, 4)
    draw(gate, replay, 2, 4)
    with pytest.raises(SamplersDisagree) as caught:
        for _ in range(3):
            draw(gate, replay, 2, 4)
    message = str(caught.value)
    assert "actor-0" not in message
    gaps = [outcome.rms_nats for outcome in read_quarantine(tmp_path)]
    versions = {outcome.trajectory.policy_version for outcome in read_quarantine(tmp_path)}
    listed = ", ".join(map(str, sorted(versions)))
    for part in (
        f"actor-1 at versions {listed} is off by up to {max(gaps):.3g} nats",
        "where 0.001 are tolerated",
        "learner.agreement_max_share = 0.25",
        str(tmp_path / "0001.records"),
        "--resume",
    ):
        assert part in message, message
    assert "\n" not in message


def test_with_nothing_but_wrong_groups_the_draw_ends_at_its_deadline(tmp_path: Path) -> None:
    model = make_policy()
    gate = make_gate(model, tmp_path, config=make_config(agreement_max_share=1.0))
    gate.keep(0, adapter_bytes(model))
    damaged = ToySampler("actor-1", damage=0.1)

    class Endless(QueueReplay):
        def draw(self, request: DrawRequest) -> Any:
            self.groups.append(as_group(damaged.group("short", version=0)))
            return super().draw(request)

    with pytest.raises(BufferStarved, match="0 of 1 groups agree with the learner"):
        draw(gate, Endless(), 0, 1, timeout_s=0.5)


def test_a_draw_that_is_stopped_in_its_wait_gives_nothing(tmp_path: Path) -> None:
    class Stopped(QueueReplay):
        def draw(self, request: DrawRequest) -> Any:
            return super().draw(request) if self.groups else []

    gate = make_gate(make_policy(), tmp_path, config=make_config(agreement_max_share=1.0))
    wrong = ToySampler("actor-0", damage=0.1).group("short", version=0)
    fine = ToySampler("actor-1").group("short", version=0)
    replay = Stopped(as_group(wrong), as_group(fine))
    assert draw(gate, replay, 0, 2) == [] and not replay.groups


def test_past_adapters_are_bounded_in_age_and_bytes() -> None:
    model = make_policy()
    size = len(adapter_bytes(model))
    aged = PastPolicies(model, max_age=2)
    heavy = PastPolicies(model, max_age=99, max_bytes=3 * size)
    tiny = PastPolicies(model, max_age=99, max_bytes=1)
    for version in (0, 1, 2, 5, 6, 7):
        for past in (aged, heavy, tiny):
            past.keep(version, adapter_bytes(model))
    assert [version for version in range(8) if version in aged] == [5, 6, 7]
    assert [version for version in range(8) if version in heavy] == [5, 6, 7]
    assert [version for version in range(8) if version in tiny] == [7]


def test_the_weights_of_now_come_back_even_when_the_check_fails() -> None:
    model = make_policy()
    past = PastPolicies(model, max_age=9)
    past.keep(0, adapter_bytes(model))
    shake(model, seed=1)
    before, places = adapter_of(model), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="in the middle"), past.as_of(0):
        assert not same_bits(adapter_of(model), before)
        raise RuntimeError("in the middle")
    assert same_bits(adapter_of(model), before)
    assert [p.data_ptr() for p in model.parameters()] == places


def test_all_is_compared_in_the_first_draws_and_then_the_share_that_is_configured(
    tmp_path: Path,
) -> None:
    model = make_policy()
    config = make_config(agreement_check_share=0.25)
    gate = make_gate(model, tmp_path, config=config, calibrated=False)
    sampler = ToySampler("actor-0")
    checked = []
    for number in range(9):
        if number == 2:  # a learner that is replaced goes on where the last one was
            saved = gate.save()
            gate = make_gate(model, tmp_path, config=config, calibrated=False)
            gate.restore(saved)
        gate.keep(number, adapter_bytes(model))
        group = as_group(sampler.group("long", version=number, size=40))
        draw(gate, QueueReplay(group), number, 1)
        checked.append(gate.metrics()["agreement/checked"])
    assert checked[:3] == [40, 40, 40]
    # A quarter of every fourth version; the record vouches for those in between.
    assert [1 <= count < 20 for count in checked[3:]] == [n % 4 == 0 for n in range(3, 9)]
    assert checked[3] == checked[5] == checked[6] == checked[7] == 0
    assert gate.metrics()["agreement/quarantined"] == 0


class LaggingSamples:
    """Groups of two actors, sampled with the adapter that was published `lag` versions before."""

    def __init__(self, published: Published, lag: int = 2) -> None:
        self._published = published
        self._lag = lag
        self._samplers = [ToySampler("actor-0"), ToySampler("actor-1", seed=1)]

    def draw(self, request: DrawRequest) -> list[Any]:
        version = request.version
        adapters = {version: data for data, version, _ in self._published.adapters}
        groups = []
        for number in range(request.num_groups):
            sampler = self._samplers[number % 2]
            sampled_at = max(version - self._lag * (number % 3), 0)
            sampler.load(adapters[sampled_at])
            key = list(PROMPTS)[number % 3]
            groups.append(as_group(sampler.group(key, version=sampled_at)))
        return groups

    def discard(self, trajectories: Any) -> None:
        raise AssertionError("all agree")


def learn(
    folder: Path, *, gated: bool, make_engine: Callable[[Any, Any], Engine] = TorchEngine
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], float]:
    """A few steps on samples of earlier versions; metrics, state, and how many were compared."""
    published = Published()
    learner, model = make_learner(
        replay=LaggingSamples(published), weights=published, make_engine=make_engine
    )
    gate = make_gate(model, folder, replay=learner.replay)
    if gated:
        learner.replay = learner.gate = gate
    learner.publish()
    rows = [learner.step() for _ in range(STEPS)]
    checked = sum(row.get("agreement/checked", 0.0) for row in rows)
    for row in rows:
        for key in [key for key in row if key.startswith("time/") or "agreement/" in key]:
            del row[key]
    return rows, learner.engine.state(), checked


def test_steps_behind_the_gate_are_those_without_it_bit_for_bit(tmp_path: Path) -> None:
    plain, plain_state, _ = learn(tmp_path, gated=False)
    gated, gated_state, checked = learn(tmp_path, gated=True)
    assert checked >= 2
    assert gated == plain
    assert same_bits(gated_state, plain_state)


def learn_in_rank(place: Any, folder: Path, gated: bool) -> None:
    """One of two DeepSpeed ranks that learn; at last rank 0 finds too much disagreement."""
    # Imported in ranks alone: it changes global state.
    from learner.deepspeed_engine import DeepSpeedEngine

    engines: list[Any] = []

    def make_engine(model: Any, config: Any) -> Any:
        engines.append(DeepSpeedEngine(model, config, place))
        return engines[0]

    rows, state, checked = learn(folder / "quarantine", gated=gated, make_engine=make_engine)
    save_file(state, folder / f"state-{place.rank}.safetensors")
    (folder / f"report-{place.rank}.json").write_text(json.dumps([rows, checked]))
    if gated:
        end_in_disagreement(engines[0], folder)
    engines[0].close()


def end_in_disagreement(engine: Any, folder: Path) -> None:
    """Both ranks learn that the run is over, and which actor is to blame."""
    damaged = ToySampler("actor-7", damage=0.1)
    groups = [as_group(damaged.group("short", version=0, size=40)) for _ in range(3)]
    learner, model = make_learner(replay=QueueReplay(*groups), make_engine=lambda *_: engine)
    gate = make_gate(model, folder / "quarantine", replay=learner.replay)
    learner.replay = learner.gate = gate
    learner.publish()
    expected = SamplersDisagree if engine.rank == 0 else Unrecoverable
    with pytest.raises(expected, match="actor-7 at version 0"):
        learner.step()


def learned_by_ranks(folder: Path, *, gated: bool) -> list[tuple[Any, dict[str, torch.Tensor]]]:
    folder.mkdir()
    run_ranks(learn_in_rank, 2, folder, 90.0, gated)
    return [
        (
            json.loads((folder / f"report-{rank}.json").read_text()),
            load_file(folder / f"state-{rank}.safetensors"),
        )
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_deepspeed_ranks_behind_the_gate_take_the_steps_without_it_bit_for_bit(
    tmp_path: Path,
) -> None:
    plain = learned_by_ranks(tmp_path / "plain", gated=False)
    gated = learned_by_ranks(tmp_path / "gated", gated=True)
    for ((rows, _), state), ((gated_rows, checked), gated_state) in zip(plain, gated, strict=True):
        assert gated_rows == rows
        assert same_bits(gated_state, state)
        # Rank 0 alone compares, the others are told what it drew.
        assert (checked >= 2) == (state is plain[0][1])

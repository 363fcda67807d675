"""The learner on a tiny model: what enters a step, what leaves it, and what it converges to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lm.packing
from buffer.config import BufferConfig
from buffer.connection import connect
from buffer.redis_store import RedisStore
from buffer.replay import BufferStarved, DrawRequest, Group, ReplayBuffer
from buffer.server import RedisServer
from buffer.trajectory import Trajectory, pack
from cluster.run.weight_store import WeightStore
from learner.batch import collate, merge_prompts, plan_micro_batches, split_rows
from learner.broadcast import decode_groups, encode_groups
from learner.engine import NonFiniteUpdate
from learner.objectives.base import Objective, ObjectiveInput
from learner.objectives.db import DetailedBalance
from learner.objectives.likelihood import TextLikelihood
from learner.objectives.ppo import ClippedPolicyGradient
from learner.objectives.raptb import RootedPrefixBalance
from learner.objectives.subtb import SubTB
from learner.objectives.tb import TrajectoryBalance
from lm.actions import IllegalCompletion
from lm.adapter import checksum, load_adapter_bytes
from lm.scoring import completion_log_probs
from tests.learner_toy import (
    ACTIONS,
    PROMPTS,
    STRINGS,
    FixedReplay,
    Published,
    UniformReplay,
    adapter_of,
    log_reward_of,
    make_learner,
    make_policy,
    make_trajectory,
)

OBJECTIVES: tuple[Objective, ...] = (
    SubTB(),
    SubTB(decay=0.9, normalisation="trajectory"),
    TrajectoryBalance(),
    DetailedBalance(),
    RootedPrefixBalance(),
    ClippedPolicyGradient(),
    TextLikelihood(),
)


def make_group(key: str, *strings: Sequence[int], **changes: Any) -> Group:
    fresh = tuple(make_trajectory(key, string, **changes) for string in strings)
    return Group(prompt_key=key, fresh=fresh, replayed=())


def assert_same_adapter(model: Any, other: Any, tolerance: float = 0.0) -> None:
    mine, theirs = adapter_of(model), adapter_of(other)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=tolerance, msg=name)


def scores(model: Any, trajectories: Sequence[Trajectory]) -> Any:
    with torch.no_grad():
        return completion_log_probs(
            model,
            ACTIONS,
            [t.prompt.tolist() for t in trajectories],
            [t.completion.tolist() for t in trajectories],
            [t.from_tool.tolist() for t in trajectories],
        )


GROUPS = [
    make_group("short", (1,), (2, 1), (1, 1, 1), (2, 1)),
    make_group("long", (1, 2, 2), (2,), (2,)),
    make_group("other", (2, 2), (1, 2, 1), (1, 2, 1), (1, 1)),
]


def test_loss_is_that_of_the_whole_batch_under_the_tempered_reward() -> None:
    learner, _ = make_learner(
        replay=FixedReplay(GROUPS), reward_temperature={"start": 2.0, "end": 1.0, "steps": 4}
    )
    model = make_policy()
    for step, temperature in enumerate((2.0, 1.75)):
        batch = collate(GROUPS, torch.device("cpu"))
        log_probs = scores(model if step == 0 else learner.model, batch.trajectories)
        inputs = ObjectiveInput(
            log_probs.log_pf_BT,
            log_probs.log_stop_BS,
            batch.log_reward_BS / temperature,
            batch.stop_BS,
            batch.group_B,
        )
        objective = SubTB()
        expected = objective(inputs).total / objective.weight(batch.stop_BS)
        metrics = learner.step()
        assert metrics["loss/value"] == pytest.approx(expected.item(), rel=1e-5)
        assert metrics["optim/reward_temperature"] == temperature


@pytest.mark.parametrize("normalisation", ["batch", "trajectory"])
@pytest.mark.parametrize("subtb_lambda", [1.0, 0.9])
def test_splitting_into_micro_batches_changes_nothing(
    normalisation: str, subtb_lambda: float
) -> None:
    settings: dict[str, Any] = {"normalisation": normalisation, "subtb_lambda": subtb_lambda}
    whole, whole_model = make_learner(**settings)
    parts, parts_model = make_learner(token_budget=1, **settings)
    for _ in range(3):
        one, many = whole.step(), parts.step()
        assert many["loss/value"] == pytest.approx(one["loss/value"], rel=1e-5)
        assert many["optim/grad_norm"] == pytest.approx(one["optim/grad_norm"], rel=1e-4)
    assert_same_adapter(whole_model, parts_model, tolerance=1e-5)


@pytest.mark.parametrize(
    ("objective", "log_z"),
    [
        *((objective, "group") for objective in OBJECTIVES),
        *((o, "learned") for o in OBJECTIVES[:5]),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_group_in_parts_teaches_what_it_teaches_whole(objective: Objective, log_z: str) -> None:
    def step(token_budget: int) -> tuple[dict[str, float], list[torch.Tensor]]:
        learner, model = make_learner(
            objective=objective,
            log_z=log_z,
            clip_norm=1e9,
            token_budget=token_budget,
        )
        torch.manual_seed(5)
        with torch.no_grad():  # a fresh adapter has no gradient in A
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.3)
        return learner.step(), gradients_of(model)

    one, many = step(10_000), step(11)
    for name in one[0].keys() | many[0].keys():
        if not name.startswith("time/"):
            assert many[0][name] == pytest.approx(one[0][name], rel=1e-5, abs=1e-6), name
    tolerance = 1e-5 * one[0]["optim/grad_norm"]
    assert tolerance > 0
    for mine, theirs in zip(many[1], one[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


def test_recomputed_activations_change_nothing() -> None:
    learners = [make_learner(checkpointing=recomputed) for recomputed in (False, True)]
    (kept, kept_model), (recomputed, recomputed_model) = learners
    for _ in range(2):
        one, two = kept.step(), recomputed.step()
        assert two["loss/value"] == pytest.approx(one["loss/value"], rel=1e-6)
    for mine, theirs in zip(gradients_of(recomputed_model), gradients_of(kept_model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def gradients_of(model: Any) -> list[torch.Tensor]:
    """Of the step taken last."""
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    return gradients


def test_behaviour_log_probabilities_never_enter_the_loss() -> None:
    plain, plain_model = make_learner(replay=FixedReplay(GROUPS))
    lies = [
        Group(
            prompt_key=group.prompt_key,
            fresh=tuple(with_recorded(trajectory, -7.0) for trajectory in group.fresh),
            replayed=(),
        )
        for group in GROUPS
    ]
    lied_to, lied_to_model = make_learner(replay=FixedReplay(lies))
    for _ in range(2):
        plain.step()
        lied_to.step()
    assert_same_adapter(plain_model, lied_to_model)


def with_recorded(trajectory: Trajectory, log_q: float) -> Trajectory:
    """The same trajectory, with `log_q` as every recorded log-probability."""
    return make_trajectory(
        trajectory.prompt_key,
        trajectory.completion.tolist(),
        behaviour_log_prob=np.full(trajectory.completion.size, log_q, dtype=np.float32),
        behaviour_log_stop=np.full(trajectory.stops.size, log_q, dtype=np.float32),
    )


def test_duplicates_run_through_the_model_once_and_count_fully() -> None:
    batch = collate(GROUPS, torch.device("cpu"))
    assert (len(batch.trajectories), len(batch.distinct)) == (11, 8)
    for trajectory, row in zip(batch.trajectories, batch.row_B.tolist(), strict=True):
        assert batch.distinct[row].id == trajectory.id


def test_agreement_compares_only_what_the_current_version_sampled() -> None:
    string = (1, 2)
    log_probs = scores(make_policy(), [make_trajectory("short", string)])
    log_q_token = log_probs.log_pf_BT[0].numpy().copy()
    log_q_stop = log_probs.log_stop_BS[0, 1:].numpy().copy()
    log_q_token[1] -= 0.25
    recorded = {"behaviour_log_prob": log_q_token, "behaviour_log_stop": log_q_stop}
    stale = make_trajectory("short", (2, 2), policy_version=7)
    taught = make_trajectory("short", (1, 1), behaviour="demonstration")
    group = Group(
        prompt_key="short",
        fresh=(make_trajectory("short", string, **recorded), stale),
        replayed=(taught,),
    )
    learner, _ = make_learner(replay=FixedReplay([group]))
    metrics = learner.step()
    assert metrics["agreement/max_nats"] == pytest.approx(0.25, abs=1e-4)
    assert metrics["agreement/mean_nats"] == pytest.approx(0.25 / 4, abs=1e-4)
    assert "agreement/max_nats" not in learner.step()


def test_metrics_describe_the_fresh_trajectories() -> None:
    group = Group(
        prompt_key="short",
        fresh=(
            make_trajectory("short", (1,), policy_version=1, correct=True),
            make_trajectory("short", (2,), policy_version=0, correct=False),
            make_trajectory("short", (2,), policy_version=1, correct=False, behaviour="tempered"),
        ),
        replayed=(make_trajectory("short", (1, 1), correct=True),),
    )
    learner, _ = make_learner(replay=FixedReplay([group]))
    learner.version = 3
    metrics = learner.step()
    assert metrics["policy/age_mean_versions"] == pytest.approx(7 / 3)
    assert metrics["policy/age_max_versions"] == 3
    assert metrics["reward/correct_fraction"] == 0.5
    assert (metrics["batch/trajectories"], metrics["batch/replayed"]) == (4, 1)
    rewards = [log_reward_of("short", s) for s in ((1,), (2,), (2,))]
    assert metrics["reward/log_mean_nats"] == pytest.approx(np.mean(rewards), rel=1e-5)
    assert metrics["policy/version"] == learner.version == 4


def test_adapters_are_published_with_version_and_checksum() -> None:
    published = Published()
    learner, model = make_learner(weights=published, publish_every_steps=2)
    seen: list[float] = []
    learner.run(5, on_step=lambda metrics: seen.append(metrics["policy/version"]))
    assert seen == [1, 2, 3, 4, 5]
    assert [version for _, version, _ in published.adapters] == [0, 2, 4]
    assert all(checksum(data) == digest for data, _, digest in published.adapters)
    learner.publish()
    receiver = make_policy()
    load_adapter_bytes(receiver, published.adapters[-1][0])
    assert_same_adapter(model, receiver)


def test_run_stops_when_asked_and_checkpoints_as_configured(tmp_path: Path) -> None:
    learner, _ = make_learner(folder=tmp_path, checkpoint_every_steps=2, checkpoints_kept=9)
    learner.run(100, stop=lambda: learner.version == 5)
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == ["step-00000002", "step-00000004", "step-00000005"]


def test_a_learner_that_waits_for_groups_heeds_a_stop_and_checkpoints(tmp_path: Path) -> None:
    class Empty(UniformReplay):
        """Has groups for two steps, then waits until it is stopped."""

        def draw(self, request: DrawRequest) -> list[Group]:
            if request.version < 2:
                return super().draw(request)
            assert request.stop()
            return []

    learner, _ = make_learner(replay=Empty(), folder=tmp_path, checkpoint_every_steps=99)
    answers = iter([False, False, False, True])
    learner.run(100, stop=lambda: next(answers))
    assert learner.completed_steps == 2
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]


def test_starvation_passes_through_by_its_own_name() -> None:
    class Starved:
        def draw(self, request: DrawRequest) -> list[Group]:
            raise BufferStarved(f"0 of {request.num_groups} groups after {request.timeout_s} s")

    learner, _ = make_learner(replay=Starved(), starvation_timeout_s=2.0)
    with pytest.raises(BufferStarved, match=r"0 of 3 groups after 2\.0 s"):
        learner.step()


def test_a_trajectory_sampled_under_other_stop_rules_is_refused() -> None:
    group = make_group(
        "short",
        (1, 2),
        stops=np.array([2], dtype=np.int32),
        log_reward=np.zeros(1, dtype=np.float32),
        behaviour_log_stop=np.zeros(1, dtype=np.float32),
    )
    learner, _ = make_learner(replay=FixedReplay([group]))
    with pytest.raises(IllegalCompletion, match="must share the task's settings"):
        learner.step()


def test_a_loss_that_is_not_finite_names_version_and_loss() -> None:
    learner, model = make_learner()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(NonFiniteUpdate, match="version 0, loss nan"):
        learner.step()


def test_groups_of_one_prompt_share_their_log_z() -> None:
    again = make_group("short", (2, 2, 2))
    merged = merge_prompts([GROUPS[0], GROUPS[1], again])
    assert [group.prompt_key for group in merged] == ["short", "long"]
    assert [t.completion.tolist() for t in merged[0].fresh][-1] == [2, 2, 2]


def columns(rows: Sequence[Trajectory]) -> int:
    """What the model is given for these rows, padding included."""
    texts = [t.prompt.tolist() for t in rows], [t.completion.tolist() for t in rows]
    return lm.packing.pack(*texts, shared_width=lm.packing.SHARED_WIDTH).ids_RW.size


@pytest.mark.parametrize("rows", [1, 2])
def test_parts_of_a_group_hold_every_row_once_within_the_budget(rows: int) -> None:
    batch = collate([GROUPS[0]], torch.device("cpu"))
    token_budget = columns(batch.distinct[:rows])
    parts = split_rows(batch, token_budget)
    members = [batch.distinct[part] for part in parts]
    assert [t for part in members for t in part] == list(batch.distinct)
    assert all(len(part) == 1 or columns(part) <= token_budget for part in members)
    assert len(split_rows(batch, columns(batch.distinct))) == 1 < len(parts)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("token_budget", [1, 25, 50, 10_000])
def test_micro_batches_hold_every_group_once_within_the_budget(
    num_ranks: int, token_budget: int
) -> None:
    rng = np.random.default_rng(0)
    groups = UniformReplay(group_size=4).draw(
        DrawRequest(num_groups=3, num_replayed=0, version=0, rng=rng, timeout_s=1.0)
    )
    parts = plan_micro_batches(groups, token_budget=token_budget, num_ranks=num_ranks)
    assert sorted(g.prompt_key for part in parts for g in part) == sorted(PROMPTS)
    for part in parts:
        distinct = collate(part, torch.device("cpu")).distinct
        assert len(part) == 1 or columns(distinct) <= token_budget
    assert len(parts) == {1: 3, 25: 2}.get(token_budget, len(parts))
    if token_budget == 10_000:
        assert len(parts) == num_ranks


def test_groups_survive_the_way_to_the_other_ranks() -> None:
    groups = [Group(prompt_key="short", fresh=GROUPS[0].fresh, replayed=GROUPS[0].fresh[:1])]
    groups.append(GROUPS[1])
    arrived = decode_groups(encode_groups(groups))
    for sent, got in zip(groups, arrived, strict=True):
        assert sent.prompt_key == got.prompt_key
        assert [pack(t) for t in sent.fresh] == [pack(t) for t in got.fresh]
        assert [pack(t) for t in sent.replayed] == [pack(t) for t in got.replayed]


def exact_distance(model: Any, prompt_key: str) -> float:
    """Total variation between the policy's distribution over strings and the exact posterior."""
    log_probs = scores(model, [make_trajectory(prompt_key, string) for string in STRINGS])
    length_B = torch.tensor([len(string) for string in STRINGS])[:, None]
    log_q_B = log_probs.log_pf_BT.sum(1) + log_probs.log_stop_BS.gather(1, length_B).squeeze(1)
    assert log_q_B.exp().sum().item() == pytest.approx(1.0, abs=1e-4)
    log_reward_B = torch.tensor([log_reward_of(prompt_key, string) for string in STRINGS])
    return (log_q_B.exp() - log_reward_B.softmax(0)).abs().sum().item() / 2


def test_off_policy_learning_drives_the_model_to_the_exact_posterior() -> None:
    learner, model = make_learner(
        replay=UniformReplay(group_size=8), replayed_per_group=0, learning_rate=0.02
    )
    before = [exact_distance(model, key) for key in PROMPTS]
    for _ in range(150):
        learner.step()
    after = [exact_distance(model, key) for key in PROMPTS]
    assert min(before) > 0.2
    assert max(after) < 0.05


def test_groups_come_from_a_real_redis(tmp_path: Path) -> None:
    config = BufferConfig(max_draws=1)
    server = RedisServer.start(tmp_path / "redis", run="toy", config=config)
    try:
        client = connect(server.url, password=server.password, timeout_s=10.0)
        replay = ReplayBuffer(RedisStore(client, run="toy"), config=config)
        for key in PROMPTS:
            fresh = tuple(make_trajectory(key, string) for string in ((1, 2), (2,), (2,)))
            replay.add(fresh)
        learner, _ = make_learner(replay=replay, replayed_per_group=1, starvation_timeout_s=0.2)
        metrics = learner.step()
        assert (metrics["batch/trajectories"], metrics["batch/replayed"]) == (12, 3)
        with pytest.raises(BufferStarved):
            learner.step()
    finally:
        server.stop(timeout_s=10.0)


def test_versions_that_were_published_after_the_last_checkpoint_never_come_again(
    tmp_path: Path,
) -> None:
    learner, _ = make_learner(folder=tmp_path, checkpoint_every_steps=4)
    learner.run(4)
    for _ in range(3):
        learner.step()  # published as 5, 6 and 7, then the process dies without a checkpoint
    published = Published()
    again, _ = make_learner(folder=tmp_path, weights=published, checkpoint_every_steps=4)
    again.restore()
    again.run(6)
    assert again.completed_steps == 6
    assert [version for _, version, _ in published.adapters] == [8, 9, 10]


def test_a_learner_that_died_before_its_first_checkpoint_begins_anew_under_new_versions(
    tmp_path: Path,
) -> None:
    store = WeightStore[bytes]()
    first, _ = make_learner(folder=tmp_path, weights=store)
    first.take_up()
    first.publish()
    lost = [first.step()["policy/version"] for _ in range(3)]
    again, again_model = make_learner(folder=tmp_path, weights=store)
    again.take_up()
    assert (again.completed_steps, again.version) == (0, 4)
    again.publish()
    newest = store.newer_than(3)
    assert newest is not None and newest.version == 4
    assert_same_adapter(again_model, make_policy())
    # One that dies at once has used its version up all the same.
    third, _ = make_learner(folder=tmp_path, weights=store)
    third.take_up()
    seen: list[float] = []
    third.run(2, on_step=lambda metrics: seen.append(metrics["policy/version"]))
    assert (lost, seen) == ([1, 2, 3], [6, 7])


def test_a_learner_that_died_just_after_a_checkpoint_publishes_what_the_board_has(
    tmp_path: Path,
) -> None:
    store = WeightStore[bytes]()
    first, _ = make_learner(folder=tmp_path, weights=store)
    first.run(4)  # ends with a checkpoint
    again, _ = make_learner(folder=tmp_path, weights=store)
    again.take_up()
    assert (again.completed_steps, again.version) == (4, 4)
    again.run(5)
    newest = store.newer_than(0)
    assert newest is not None and newest.version == 5

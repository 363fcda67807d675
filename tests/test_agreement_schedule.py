"""Which trajectories the gate compares, and when: the law by itself, without a model."""

from collections.abc import Mapping, Sequence

from buffer.trajectory import Trajectory
from learner.agreement.comparison import Gap, Pair, pair_of
from learner.agreement.schedule import Schedule
from tests.learner_toy import make_trajectory


def rows(actor: str, version: int, lengths: Sequence[int] = (1, 3, 2)) -> list[Trajectory]:
    """Trajectories of an actor; the second is the longest."""
    return [
        make_trajectory("long", (1,) * length, policy_version=version, actor=actor)
        for length in lengths
    ]


def play(
    schedule: Schedule,
    versions: Mapping[str, Sequence[int]],
    *,
    wrong: frozenset[Pair] = frozenset(),
) -> dict[str, list[int]]:
    """Draw after draw, each of one version of an actor; the versions that were compared."""
    compared: dict[str, list[int]] = {actor: [] for actor in versions}
    draws = sorted((version, actor) for actor, each in versions.items() for version in each)
    for version, actor in draws:
        chosen = schedule.choose(rows(actor, version), [], wrong=wrong, version=version)
        pairs = {pair_of(t) for t in chosen}
        schedule.note(pairs - wrong, pairs & wrong)
        compared[actor] += [version] * bool(pairs)
    return compared


def heard(actor: str, version: int, rms_nats: float) -> dict[Pair, Gap]:
    return {(actor, version): Gap(decisions=100, rms_nats=rms_nats, mean_nats=0.0)}


def test_who_agrees_is_compared_ever_less_often_down_to_the_share() -> None:
    assert play(Schedule(0.05), {"a": range(101)}) == {
        "a": [0, 1, 2, 4, 8, 16, 20, 40, 60, 80, 100]
    }
    assert play(Schedule(0.0), {"a": range(101)}) == {"a": [0, 1, 2, 4, 8, 16, 32, 64]}
    assert play(Schedule(1.0), {"a": range(9)}) == {"a": list(range(9))}


def test_actors_that_skip_versions_come_back_to_the_versions_of_the_others() -> None:
    compared = play(Schedule(0.05), {"a": range(101), "b": range(3, 101), "c": range(0, 101, 4)})
    assert compared["b"][-4:] == compared["c"][-4:] == compared["a"][-4:] == [40, 60, 80, 100]
    # Who has none of a version that is due is compared at the next that it has.
    assert play(Schedule(0.05), {"d": range(1, 101, 3)})["d"][-3:] == [61, 82, 100]


def test_the_longest_of_what_nobody_vouches_for_is_compared_and_all_that_has_been_wrong() -> None:
    schedule = Schedule(0.0)
    fresh, replayed = rows("a", 1), [*rows("a", 0), *rows("b", 0)]
    chosen = schedule.choose(fresh, replayed, wrong=frozenset(), version=1)
    assert set(chosen) == {fresh[1], replayed[1], replayed[4]}
    schedule.note({("a", 0), ("a", 1)}, frozenset())
    assert schedule.choose(fresh, replayed, wrong=frozenset(), version=1) == [replayed[4]]
    # What has been wrong is compared whole, whoever vouches.
    chosen = schedule.choose(fresh, replayed, wrong={("a", 0)}, version=1)
    assert set(chosen) == {replayed[4], *replayed[:3]}


def test_a_share_of_the_draw_is_compared_with_what_is_due() -> None:
    fresh = [t for _ in range(100) for t in rows("a", 5)]
    of_others = rows("b", 4) * 20
    schedule = Schedule(0.2)
    schedule.note({("b", 4)}, frozenset())
    chosen = schedule.choose(fresh, of_others, wrong=frozenset(), version=5)
    assert 40 < len(chosen) < 110 and {pair_of(t) for t in chosen} == {("a", 5)}
    assert chosen == schedule.choose(fresh, of_others, wrong=frozenset(), version=5)
    schedule.note({("a", 5)}, frozenset())
    assert schedule.choose(fresh, of_others, wrong=frozenset(), version=5) == []


def test_one_that_was_wrong_begins_anew_and_nothing_from_before_is_vouched_for() -> None:
    schedule = Schedule(0.05)
    play(schedule, {"a": range(21), "b": range(21)})
    assert [schedule.vouches(("a", version)) for version in (3, 19, 39, 40)] == [True] * 3 + [False]
    liar = frozenset({("a", 40)})
    compared = play(schedule, {"a": range(40, 51), "b": range(21, 51)}, wrong=liar)
    assert compared == {"a": [40, 41, 42, 44, 48], "b": [40]}
    assert not any(schedule.vouches(("a", version)) for version in (3, 19, 20, 39, 40))
    assert schedule.vouches(("a", 43))
    assert schedule.vouches(("b", 39))


def test_who_differs_more_than_when_it_agreed_is_compared_at_once() -> None:
    schedule = Schedule(0.05)
    play(schedule, {"a": range(21), "b": range(21)})
    for version, (of_a, of_b) in enumerate([(0.1, 0.1), (0.14, 0.1), (0.14, 0.22)], start=22):
        schedule.hear(heard("a", version - 1, of_a) | heard("b", version - 1, of_b), version)
    assert schedule.vouches(("a", 25)) and not schedule.vouches(("b", 25))
    assert not schedule.vouches(("b", 21)) and schedule.vouches(("b", 20))
    assert play(schedule, {"a": range(25, 41), "b": range(25, 41)}) == {"a": [40], "b": [25, 40]}
    # It agreed: from now on this much is usual.
    for version in (42, 43):
        schedule.hear(heard("b", version - 1, 0.2), version)
    assert schedule.vouches(("b", 44))
    schedule.hear(heard("b", 43, float("nan")), 44)
    assert not schedule.vouches(("b", 44))


def test_who_breaks_within_a_version_that_agreed_is_compared_again_at_that_version() -> None:
    schedule = Schedule(0.05)
    play(schedule, {"a": range(21)})
    schedule.hear(heard("a", 20, 0.1), 21)
    assert schedule.vouches(("a", 20))
    schedule.hear(heard("a", 20, 0.3), 22)
    assert not schedule.vouches(("a", 20)) and schedule.vouches(("a", 19))
    fresh = rows("a", 20)
    assert schedule.choose(fresh, [], wrong=frozenset(), version=22) == [fresh[1]]


def test_of_who_differs_more_two_versions_are_compared_the_doubted_one_and_the_newest() -> None:
    schedule = Schedule(0.05)
    play(schedule, {"a": range(21)})
    for version, rms_nats in ((24, 0.1), (25, 0.3)):
        gaps = heard("a", version - 4, rms_nats) | heard("a", version - 2, rms_nats)
        schedule.hear(gaps, version)
    newest, older, replayed = rows("a", 24), rows("a", 22), [*rows("a", 23), *rows("a", 25)]
    none = frozenset[Pair]()
    assert schedule.choose([*older, *newest], replayed, wrong=none, version=26) == [
        replayed[1],
        newest[1],
    ]
    # What is replayed may be of the time before, as is what is older than what was heard.
    of_before = schedule.choose(older, replayed, wrong=none, version=26)
    assert set(of_before) == {older[1], replayed[1], replayed[4]}
    schedule.note({("a", 22)}, none)
    assert not schedule.vouches(("a", 23))
    schedule.note({("a", 24)}, none)
    assert schedule.choose([*older, *newest], replayed, wrong=none, version=26) == []


def test_what_is_replayed_from_long_ago_is_not_heard_and_the_most_is_usual_for_a_while() -> None:
    schedule = Schedule(0.02)
    play(schedule, {"a": range(33)})
    schedule.hear(heard("a", 33, 0.1), 34)
    schedule.hear(heard("a", 5, 9.0), 34)
    schedule.hear(heard("a", 34, 0.1) | heard("a", 28, 9.0), 35)
    schedule.hear(heard("a", 34, 0.14), 35)
    schedule.hear(heard("a", 35, 0.2), 36)
    assert schedule.vouches(("a", 36))
    for version in range(37, 42):  # 0.2 of then counts for 0.155 now
        schedule.hear(heard("a", version - 1, 0.1), version)
    schedule.hear(heard("a", 41, 0.23), 42)
    assert schedule.vouches(("a", 42))
    for version in range(43, 80):
        schedule.hear(heard("a", version - 1, 0.1), version)
    assert not schedule.alarmed("a")
    schedule.hear(heard("a", 79, 0.16), 80)
    assert schedule.alarmed("a")


def test_a_doubt_ends_with_what_is_newer_than_all_that_raised_it_and_so_much_is_usual_then() -> (
    None
):
    schedule = Schedule(0.02)
    play(schedule, {"a": range(33)})
    schedule.hear(heard("a", 33, 0.1), 34)
    schedule.hear(heard("a", 34, 0.3), 35)
    schedule.hear(heard("a", 33, 0.3), 35)  # what is older takes nothing back
    at_33, at_34, at_35 = rows("a", 33), rows("a", 34), rows("a", 35)
    none = frozenset[Pair]()
    # At the version that raised it an actor may have broken half-way.
    chosen = schedule.choose([*at_33, *at_34], [], wrong=none, version=35)
    assert set(chosen) == {at_33[1], at_34[1]}
    for version in (33, 34):
        schedule.note({("a", version)}, none)
        assert schedule.alarmed("a")
    chosen = schedule.choose([*at_33, *at_34, *at_35], [], wrong=none, version=36)
    assert at_35[1] in chosen
    schedule.note({("a", 35)}, none)
    schedule.hear(heard("a", 35, 0.4), 36)
    assert not schedule.alarmed("a")


def test_neither_a_version_of_the_future_nor_one_huge_difference_makes_deaf() -> None:
    schedule = Schedule(0.02)
    play(schedule, {"a": range(33)})
    schedule.hear(heard("a", 33, 0.1) | heard("a", 10**9, 0.1), 34)
    schedule.hear(heard("a", 34, 1e4), 35)
    assert schedule.alarmed("a")
    fresh, of_the_future = rows("a", 35), rows("a", 10**9)
    none = frozenset[Pair]()
    chosen = schedule.choose([*fresh, *of_the_future], [], wrong=none, version=36)
    assert fresh[1] in chosen
    schedule.note({("a", 35)}, none)
    assert not schedule.alarmed("a")
    schedule.hear(heard("a", 35, 0.61), 36)
    assert schedule.alarmed("a")


def test_four_steps_move_the_policy_by_twice_what_one_does_and_its_own_version_by_nothing() -> None:
    schedule = Schedule(0.05)
    play(schedule, {"a": range(21)})
    schedule.hear(heard("a", 21, 1e-6), 21)
    for age, rms_nats in ((1, 0.1), (4, 0.2), (4, 0.29)):
        schedule.hear(heard("a", 25 - age, rms_nats), 25)
        assert schedule.vouches(("a", 25))
    schedule.hear(heard("a", 21, 0.44), 25)  # 1.5 times the most
    assert not schedule.vouches(("a", 25))


def test_a_schedule_goes_on_from_where_it_was_saved() -> None:
    schedule, restored = Schedule(0.05), Schedule(0.05)
    play(schedule, {"a": range(10), "b": range(10)})
    schedule.hear(heard("a", 9, 0.1) | heard("b", 9, 0.1), 10)
    restored.restore(*schedule.save())
    for each in (schedule, restored):
        each.hear(heard("a", 9, 0.2) | heard("b", 9, 0.14), 10)
    versions = {"a": range(10, 50), "b": range(10, 50)}
    assert play(schedule, versions) == play(restored, versions)
    schedule.keep(range(12, 50))
    assert all(version >= 12 for _, version in schedule.save()[0])

"""Mutated records and files against what reads them: either is accepted or refused by our error.

Records go to the trajectory decoder, files with one mutated line to every data loader and to the
configuration. Hypothesis draws seeds and samples, and each makes a batch of mutations: bytes that
are cut, put in or replaced, among them what breaks parsers, and fields of a record that hold
something else. Any other error, and an input that takes longer than HANG_S, is told, and the exit
status is 1.

    python bench/fuzz.py [--json] [--records 1000000] [--lines 100000] [--seed 0]
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import hypothesis
import msgpack
import numpy as np
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from buffer.trajectory import MalformedTrajectory, Trajectory, pack, unpack
from cluster.config.file import PROJECT_ROOT, load_config
from cluster.config.validation import ConfigError
from tasks.arithmetic.data import load_items
from tasks.config import QuestionsConfig
from tasks.questions.data import read_questions
from tasks.records import DataError
from tasks.sentences.files import load_continued, load_prompts, load_stories
from tasks.subjectivity.data import load_reviews

HANG_S = 10.0
BATCH = 100  # inputs of one seed
LINES = 3  # of a file, of which one is mutated

# What breaks parsers: nesting, huge numbers, numbers that are none, ends of text, other encodings.
TOKENS = (
    *(b"[" * 5000, b"{" * 5000, b'{"a":' * 5000, b"9" * 5000, b"a" * 200_000, b"a." * 2000),
    *(b"1e999", b"-0", b"NaN", b"Infinity", b"null", b"true", b"[]", b"{}", b'""', b"0x10"),
    *(b'"', b"'", b"\\", b",", b":", b"=", b"#", b"\n", b"\r", b"\t", b"\x00", b"\x1a", b" "),
    *(b"\\ud800", b"\\u0000", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"\xf0\x9f\x98\x80"),
)
# What a field of a record may hold instead.
VALUES: tuple[object, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**53, 2**63, 2**64 - 1, 0.0, -1.0, 1e300),
    *(float("nan"), float("inf"), "", "a", "a" * 2000, b"", b"\x00" * 4, b"\xff" * 12, []),
    *([0, 0, 0, 0], [1, 2, 3, -1], [2**40] * 4, [1.0] * 4, ["a"], [[]], {}, {"a": 1}),
)

Mutate = Callable[[random.Random], bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """A reader, what makes inputs for it, and the error that it may raise."""

    name: str
    read: Callable[[bytes], object]
    mutate: Mutate
    refusal: type[Exception]


class Escaped(AssertionError):
    """A reader raised another error than its own, or took longer than HANG_S."""


class _Hang(BaseException):
    """The alarm rang."""


def edited(data: bytes, rng: random.Random) -> bytes:
    """One to three places cut, filled or replaced."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        put = rng.choice(TOKENS) if rng.random() < 0.5 else rng.randbytes(rng.randrange(5))
        data = data[:at] + put + data[at + rng.randrange(6) :]
    return data


def of_records() -> Mutate:
    """Packed trajectories of several lengths, with edited bytes or a field of another kind."""
    packed = [pack(_trajectory(length)) for length in (0, 1, 3, 40)]

    def mutate(rng: random.Random) -> bytes:
        data = rng.choice(packed)
        if rng.random() < 0.5:
            return edited(data, rng)
        fields = msgpack.unpackb(data)
        for _ in range(rng.randint(1, 2)):
            fields[rng.randrange(len(fields))] = rng.choice(VALUES)
        return bytes(msgpack.packb(fields))

    return mutate


def _trajectory(length: int) -> Trajectory:
    stops = np.arange(length + 1, dtype=np.int32)
    return Trajectory(
        task="fuzz",
        prompt_key="prompt",
        prompt=np.arange(5, dtype=np.int32),
        answer=np.arange(2, dtype=np.int32),
        completion=np.arange(length, dtype=np.int32),
        from_tool=np.zeros(length, np.bool_),
        stops=stops,
        log_reward=-np.ones(length + 1, dtype=np.float32),
        behaviour_log_prob=-np.ones(length, dtype=np.float32),
        behaviour_log_stop=-np.ones(length + 1, dtype=np.float32),
        policy_version=3,
        behaviour="on_policy",
        temperature=1.0,
        actor="actor-0",
        created_s=1.0,
        correct=None,
    )


def of_lines(lines: Sequence[str]) -> Mutate:
    """A file with one of its lines edited."""
    encoded = [line.encode() for line in lines]

    def mutate(rng: random.Random) -> bytes:
        number = rng.randrange(len(encoded))
        changed = edited(encoded[number], rng)
        return b"\n".join([*encoded[:number], changed, *encoded[number + 1 :]])

    return mutate


def targets(folder: Path) -> list[Target]:
    """Every reader of bytes that somebody else may have written; files go to `folder`."""

    def through(load: Callable[[str], object], suffix: str) -> Callable[[bytes], object]:
        path = folder / f"input{suffix}"

        def read(data: bytes) -> object:
            path.write_bytes(data)
            return load(str(path))

        return read

    def shipped(path: str) -> list[str]:
        return (PROJECT_ROOT / path).read_text(encoding="utf-8").splitlines()

    data = "tasks/data"
    sums = json.loads("\n".join(shipped(f"{data}/arithmetic/demonstrations.json")))[:LINES]
    sum_list = ["[", *(json.dumps(one) + "," for one in sums[:-1]), json.dumps(sums[-1]), "]"]
    stories = shipped(f"{data}/infilling/train.jsonl")[:LINES]
    rows = [json.loads(story) for story in stories]
    passages = [
        json.dumps(dict(zip(("beginning", "middle", "ending"), row.values(), strict=False)))
        for row in rows
    ]
    prompts = shipped(f"{data}/continuation/train.txt")[:LINES]
    continued = shipped(f"{data}/continuation/demonstrations.jsonl")[:LINES]
    reviews = shipped(f"{data}/subjectivity/train.jsonl")[:LINES]
    questions = shipped(f"{data}/questions/test.jsonl")[:LINES]
    asked = QuestionsConfig(name="questions", data="any")

    def load_questions(path: str) -> object:
        return read_questions(asked, path, lambda question: question)

    of_files: list[tuple[str, Callable[[str], object], str, list[str]]] = [
        ("sums", load_items, ".json", sum_list),
        ("stories", load_stories, ".jsonl", stories),
        ("stories in CSV", load_stories, ".csv", _as_csv(stories)),
        ("prompts", load_prompts, ".txt", prompts),
        ("continued prompts", load_continued, ".jsonl", continued),
        ("reviews", load_reviews, ".jsonl", reviews),
        ("passages", load_stories, ".jsonl", passages),
        ("questions", load_questions, ".jsonl", questions),
        ("questions in CSV", load_questions, ".csv", _as_csv(questions)),
    ]
    toml = of_lines(shipped("tasks/arithmetic.toml"))
    return [
        Target("trajectory", unpack, of_records(), MalformedTrajectory),
        *(
            Target(name, through(load, suffix), of_lines(lines), DataError)
            for name, load, suffix, lines in of_files
        ),
        Target("configuration", through(load_config, ".toml"), toml, ConfigError),
    ]


def _as_csv(lines: Sequence[str]) -> list[str]:
    rows = [json.loads(line) for line in lines]
    return [",".join(rows[0]), *(",".join(f'"{text}"' for text in row.values()) for row in rows)]


def fuzz(target: Target, count: int, *, seed: int) -> dict[str, object]:
    """How many of about `count` inputs were accepted and refused, and the slowest.

    Raises Escaped for an input that met anything else.
    """
    counts = {"accepted": 0, "refused": 0}
    slowest_s = 0.0

    def tries(batch_seed: int) -> None:
        nonlocal slowest_s
        rng = random.Random(batch_seed)
        for _ in range(BATCH):
            data = target.mutate(rng)
            began_s = time.perf_counter()
            counts["accepted" if accepts(target, data) else "refused"] += 1
            slowest_s = max(slowest_s, time.perf_counter() - began_s)

    run = hypothesis.given(st.integers(0, 2**64 - 1))(tries)
    run = hypothesis.settings(
        max_examples=max(count // BATCH, 1),
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )(run)
    began_s = time.perf_counter()
    hypothesis.seed(seed)(run)()
    return {
        "target": target.name,
        **counts,
        "slowest_ms": round(1e3 * slowest_s, 1),
        "seconds": round(time.perf_counter() - began_s, 1),
    }


def accepts(target: Target, data: bytes) -> bool:
    """Whether the reader takes the input; raises Escaped where it neither does nor refuses."""
    try:
        with _within(HANG_S):
            target.read(data)
        return True
    except target.refusal:
        return False
    except (Exception, _Hang) as error:
        shown = f"{type(error).__name__}: {error!s:.200}"
        raise Escaped(f"{target.name}: {shown}\nof {len(data)} bytes {data!r:.400}") from error


@contextmanager
def _within(limit_s: float) -> Iterator[None]:
    """Raise _Hang in the block after `limit_s`; for the main thread of a process."""

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise _Hang(f"longer than {limit_s} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--lines", type=int, default=100_000, help="for each reader of files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for target in targets(Path(folder)):
            count = arguments.records if target.name == "trajectory" else arguments.lines
            try:
                rows.append(fuzz(target, count, seed=arguments.seed))
            except Escaped as error:
                rows.append({"target": target.name, "escaped": str(error)})
            if not arguments.json:
                print("  ".join(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows}))
    sys.exit(any("escaped" in row for row in rows))


if __name__ == "__main__":
    main()

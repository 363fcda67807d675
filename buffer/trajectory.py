"""The wire record: one scored completion, and its strict, bounded msgpack form.

Nothing here trusts its input: `unpack` reads bytes that any client of the store may have written,
so every size, type and range is checked before a record exists. No pickle, no eval.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

FORMAT = 1
INTEGERS = ("prompt", "answer", "completion", "stops")
LOGS = ("log_reward", "behaviour_log_prob", "behaviour_log_stop")
INT32, FLOAT32 = np.dtype("<i4"), np.dtype("<f4")  # on the wire
BEHAVIOURS = ("on_policy", "tempered", "demonstration")
MAX_BYTES = 1 << 22
MAX_TEXT = 1024
MAX_GROUP = 1024
# Vocabularies end below 2**20, and below it a token id is also a code point, which is what lets
# the near-duplicate rule compare completions as strings.
MAX_TOKEN = 1 << 20
MAX_VERSION = 1 << 53
# log-softmax in float32 can round a certain event to slightly above zero.
LOG_PROBABILITY_SLACK = 1e-3


class MalformedTrajectory(ValueError):
    """A trajectory, or the bytes of one, breaks the record's rules."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """One completion Z of a prompt, with the log-reward of every place where it may stop.

    P prompt, A answer, L completion tokens; S stop states, the prefixes of Z where the policy may
    stop. Raises MalformedTrajectory when the fields do not fit one another.
    """

    task: str
    prompt_key: str  # stable id of the prompt (X and Y)
    prompt: NDArray[np.int32]  # [P] what the policy conditions on
    answer: NDArray[np.int32]  # [A] Y, may be empty
    completion: NDArray[np.int32]  # [L] Z, stop token excluded
    from_tool: NDArray[np.bool_]  # [L] inserted by the environment
    stops: NDArray[np.int32]  # [S] strictly increasing prefix lengths; the last is L
    log_reward: NDArray[np.float32]  # [S] nats, untempered: log R(z_1:t stop)
    behaviour_log_prob: NDArray[np.float32]  # [L] nats, as sampled, at T = 1; 0 at tool tokens
    behaviour_log_stop: NDArray[np.float32]  # [S] nats; 0 where the stop was forced
    policy_version: int  # of the weights that sampled it; 0 for demonstrations
    behaviour: str  # one of BEHAVIOURS
    temperature: float  # 1.0 on policy
    actor: str  # who sampled it
    created_s: float  # unix seconds
    correct: bool | None  # whether the answer is right; None where the task cannot tell

    def __post_init__(self) -> None:
        check_scalars(self)
        check_tokens(self)
        check_logs(self)

    @property
    def id(self) -> str:
        """Hex blake2b-128 of task, prompt and completion: equal content, equal id."""
        digest = hashlib.blake2b(digest_size=16)
        texts = (self.task.encode(), self.prompt_key.encode())
        for field in (*texts, self.prompt.tobytes(), self.completion.tobytes()):
            # The length goes first, so that no two lists of fields share their bytes.
            digest.update(len(field).to_bytes(8, "little"))
            digest.update(field)
        return digest.hexdigest()

    @property
    def log_q(self) -> float:
        """log q(Z ⊤) of the whole completion under the policy that sampled it, nats."""
        path = float(self.behaviour_log_prob.sum(dtype=np.float64))
        return path + float(self.behaviour_log_stop[-1])

    @property
    def terminal_log_reward(self) -> float:
        """Log-reward of the whole completion, nats: the priority in replay."""
        return float(self.log_reward[-1])

    def log_weight(self, reward_temperature: float) -> float:
        """log R / T - log q of the whole completion, nats."""
        return self.terminal_log_reward / reward_temperature - self.log_q


def check_scalars(trajectory: Trajectory) -> None:
    for name in ("task", "prompt_key", "actor"):
        text = getattr(trajectory, name)
        if type(text) is not str or not 0 < len(text) <= MAX_TEXT:
            raise MalformedTrajectory(f"{name} must be 1 to {MAX_TEXT} characters: {text!r:.80}")
    version = trajectory.policy_version
    if type(version) is not int or not 0 <= version < MAX_VERSION:
        raise MalformedTrajectory(f"policy_version must be an integer >= 0: {version!r:.80}")
    if trajectory.behaviour not in BEHAVIOURS:
        raise MalformedTrajectory(f"behaviour must be one of {BEHAVIOURS}")
    temperature, created_s = trajectory.temperature, trajectory.created_s
    if not isinstance(temperature, float) or not 0.0 < temperature < math.inf:
        raise MalformedTrajectory(f"temperature must be a positive float: {temperature!r:.80}")
    if not isinstance(created_s, float) or not 0.0 <= created_s < math.inf:
        raise MalformedTrajectory(f"created_s must be unix seconds as a float: {created_s!r:.80}")
    if trajectory.correct is not None and type(trajectory.correct) is not bool:
        raise MalformedTrajectory(f"correct must be a bool or None: {trajectory.correct!r:.80}")


def check_tokens(trajectory: Trajectory) -> None:
    integers = rows(trajectory, INTEGERS, np.int32)
    # Read as unsigned, a negative number is a huge one: one reduction bounds both sides.
    if np.maximum.reduce(integers.view(np.uint32)) >= MAX_TOKEN:
        raise MalformedTrajectory(f"a token id or stop state lies outside [0, {MAX_TOKEN})")
    from_tool = rows(trajectory, ("from_tool",), np.bool_)
    length, stops = trajectory.completion.size, trajectory.stops
    if from_tool.size != length:
        raise MalformedTrajectory(f"from_tool has {from_tool.size} entries for {length} tokens")
    if stops.size == 0 or stops[-1] != length or not np.logical_and.reduce(stops[1:] > stops[:-1]):
        raise MalformedTrajectory(f"stops must rise strictly and end at the length {length}")
    if np.logical_or.reduce(from_tool[stops[:-1]]):
        raise MalformedTrajectory("a stop state lies where the tool is about to insert a token")


def check_logs(trajectory: Trajectory) -> None:
    t, num_stops, length = trajectory, trajectory.stops.size, trajectory.completion.size
    logs = rows(t, LOGS, np.float32)
    sizes = (t.log_reward.size, t.behaviour_log_prob.size, t.behaviour_log_stop.size)
    if sizes != (num_stops, length, num_stops):
        raise MalformedTrajectory(
            f"{LOGS} have {sizes} entries for {num_stops} stop states and {length} tokens"
        )
    if not np.logical_and.reduce(np.isfinite(logs)):
        raise MalformedTrajectory("a log-reward or log-probability is not finite")
    if np.maximum.reduce(logs[num_stops:]) > LOG_PROBABILITY_SLACK:
        raise MalformedTrajectory("a log-probability lies above 0")
    if np.logical_or.reduce(trajectory.behaviour_log_prob[trajectory.from_tool]):
        raise MalformedTrajectory("behaviour_log_prob must be 0 at tool tokens")


def rows(
    trajectory: Trajectory, names: tuple[str, ...], dtype: type[np.generic]
) -> NDArray[np.generic]:
    """The named fields in one row, which is faster to check than each; all must be of `dtype`."""
    arrays = [getattr(trajectory, name) for name in names]
    for name, array in zip(names, arrays, strict=True):
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
            raise MalformedTrajectory(f"{name} must be a one-dimensional {dtype.__name__} array")
    return np.concatenate(arrays)


def pack(trajectory: Trajectory) -> bytes:
    """At most MAX_BYTES: all integers in one little-endian block, all logs in another."""
    t = trajectory
    integers = (t.prompt, t.answer, t.completion, t.stops)
    logs = (t.log_reward, t.behaviour_log_prob, t.behaviour_log_stop)
    record = (
        FORMAT,
        t.task,
        t.prompt_key,
        [*map(len, integers)],
        np.concatenate(integers).astype(INT32, copy=False).tobytes(),
        t.from_tool.tobytes(),
        np.concatenate(logs).astype(FLOAT32, copy=False).tobytes(),
        *(t.policy_version, t.behaviour, t.temperature, t.actor, t.created_s, t.correct),
    )
    data: bytes = msgpack.packb(record)
    if len(data) > MAX_BYTES:
        raise MalformedTrajectory(f"trajectory takes {len(data)} bytes, more than {MAX_BYTES}")
    return data


def unpack(data: bytes) -> Trajectory:
    """Read what `pack` wrote, else MalformedTrajectory; arrays are read-only views of `data`."""
    fields = read_array(data, max_len=13)
    if len(fields) != 13 or type(fields[0]) is not int or fields[0] != FORMAT:
        raise MalformedTrajectory(f"not a trajectory of format {FORMAT}")
    _, task, prompt_key, sizes, integers, from_tool, logs, *origin = fields
    version, behaviour, temperature, actor, created_s, correct = origin
    if type(sizes) is not list or list(map(type, sizes)) != [int] * 4 or min(sizes) < 0:
        raise MalformedTrajectory("sizes must be four integers >= 0")
    if not all(type(block) is bytes for block in (integers, from_tool, logs)):
        raise MalformedTrajectory("arrays must be binary")
    num_prompt, num_answer, length, num_stops = sizes
    expected = (4 * sum(sizes), length, 4 * (2 * num_stops + length))
    if (len(integers), len(from_tool), len(logs)) != expected:
        raise MalformedTrajectory("array blocks do not have the sizes they announce")
    if from_tool.translate(None, b"\x00\x01"):
        raise MalformedTrajectory("from_tool holds a byte other than 0 and 1")
    tokens = np.frombuffer(integers, INT32)
    floats = np.frombuffer(logs, FLOAT32)
    answer_at, completion_at = num_prompt, num_prompt + num_answer
    return Trajectory(
        task=task,
        prompt_key=prompt_key,
        prompt=tokens[:answer_at],
        answer=tokens[answer_at:completion_at],
        completion=tokens[completion_at : completion_at + length],
        from_tool=np.frombuffer(from_tool, np.bool_),
        stops=tokens[completion_at + length :],
        log_reward=floats[:num_stops],
        behaviour_log_prob=floats[num_stops : num_stops + length],
        behaviour_log_stop=floats[num_stops + length :],
        policy_version=version,
        behaviour=behaviour,
        temperature=temperature,
        actor=actor,
        created_s=created_s,
        correct=correct,
    )


def pack_group(payloads: Sequence[bytes]) -> bytes:
    """Bytes of the packed trajectories of one group."""
    return msgpack.packb(list(payloads))


def unpack_group(data: bytes) -> tuple[Trajectory, ...]:
    """Read what `pack_group` wrote; raises MalformedTrajectory."""
    payloads = read_array(data, max_len=MAX_GROUP)
    if not payloads or not all(type(payload) is bytes for payload in payloads):
        raise MalformedTrajectory(f"a group is 1 to {MAX_GROUP} binary trajectories")
    return tuple(unpack(payload) for payload in payloads)


def read_array(data: bytes, *, max_len: int) -> list[Any]:
    """Decode a msgpack array of at most `max_len` entries, without maps or extensions."""
    try:
        fields = msgpack.unpackb(
            data, max_array_len=max_len, max_map_len=0, max_ext_len=0, max_bin_len=MAX_BYTES
        )
    # msgpack raises a different type for each way of being wrong; all of them mean the same here.
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise MalformedTrajectory(f"not msgpack within bounds: {error!r:.200}") from error
    if not isinstance(fields, list):
        raise MalformedTrajectory("not a msgpack array")
    return fields

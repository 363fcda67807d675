"""The command line: verbs, their arguments and the module of each. Imports nothing heavy."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

_DESCRIPTION = """\
Amortized Bayesian inference in language models: GFlowNet fine-tuning as a distributed
actor-learner system.

verbs:
{verbs}

'amortize VERB --help' says more of each."""


class _Parser(argparse.ArgumentParser):
    """Repeats no unknown argument, which may be a password."""

    def error(self, message: str) -> NoReturn:
        told, unknown, words = message.partition("unrecognized arguments: ")
        options = [word.partition("=")[0] for word in words.split() if word.startswith("-")]
        super().error(f"{told}{unknown}{' '.join(options)}")


class _Verb:
    """What a verb does, its arguments (parents, to argparse), and its module in `cluster`."""

    def __init__(
        self, summary: str, *arguments: argparse.ArgumentParser, module: str = "commands.{verb}"
    ) -> None:
        self.summary, self.arguments, self.module = summary, arguments, module


def parse(argv: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """The verb and its arguments; exits with a message where they are wrong."""
    listing = "\n".join(f"  {name:<12}{verb.summary}" for name, verb in _VERBS.items())
    parser = argparse.ArgumentParser(
        prog="amortize",
        usage="amortize VERB ...",
        description=_DESCRIPTION.format(verbs=listing),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=list(_VERBS), metavar="VERB", help=argparse.SUPPRESS)
    if argv and (near := difflib.get_close_matches(argv[0], _VERBS, n=1)) and argv[0] != near[0]:
        parser.error(f"there is no verb {argv[0]!r}; did you mean {near[0]}?")
    name = parser.parse_args(argv[:1]).verb
    verb = _VERBS[name]
    verb_parser = _Parser(
        prog=f"amortize {name}", description=f"{verb.summary}.", parents=verb.arguments
    )
    # Intermixed, so that overrides may stand before and after options.
    return name, verb_parser.parse_intermixed_args(argv[1:])


def module_of(name: str) -> str:
    """The module that runs a verb."""
    return f"cluster.{_VERBS[name].module}".format(verb=name)


def _number(text: str) -> int:
    """A number of parts or of runs: at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _actor_counts(text: str) -> tuple[int, ...]:
    """Numbers of actors, ascending."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] != 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give whole numbers such as 1,2,4,8, with 1 among them, which efficiency "
            f"is measured against"
        )
    return tuple(counts)


def _engines(text: str) -> tuple[str, ...]:
    """Rollout engines, each once."""
    engines = tuple(dict.fromkeys(text.split(",")))
    if not set(engines) <= {"native", "vllm"}:
        raise argparse.ArgumentTypeError(f"{text!r}: give native, vllm or both, with a comma")
    return engines


def _argument(name: str, help: str, **settings: Any) -> argparse.ArgumentParser:
    """One argument of a verb; an option is written with its value, `--run NAME`."""
    return _one_of((name, help, settings))


def _one_of(*either: tuple[str, str, dict[str, Any]]) -> argparse.ArgumentParser:
    """Options, of which a command line may have one, with their help and settings."""
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_mutually_exclusive_group() if either[1:] else parent
    for name, help, settings in either:
        flag, _, metavar = name.partition(" ")
        named: dict[str, Any] = {"metavar": metavar} if metavar else {}
        group.add_argument(flag, help=help, **named, **settings)
    return parent


_FLAG: dict[str, Any] = {"action": "store_true"}
_COUNT: dict[str, Any] = {"type": _number}
_LIST: dict[str, Any] = {"nargs": "+", "default": []}

_OVERRIDES = _argument(
    "overrides",
    "changes to the configuration, before an option of several values; values as in TOML",
    metavar="section.key=value",
    nargs="*",
)
_CONFIG = _argument("config", "TOML file of the run", metavar="CONFIG")
_JSON = _argument("--json", "print one JSON object", **_FLAG)
_MEASURING = (_CONFIG, _JSON, _OVERRIDES)
_ADDRESS = "Ray cluster to use (default: {}, RAY_ADDRESS, else one on this machine)"
_NEW_RUN = (
    _argument("--run NAME", "name in runs/ (default: task and time)"),
    _argument("--resume", "go on with what is called --run", **_FLAG),
    _one_of(
        ("--address A", _ADDRESS.format("cluster.address"), {}),
        ("--local", "one process, without Ray", _FLAG),
    ),
)

_SPLITS = ("validation", "test")
_MANY = "experiments.{verb}"
_COMPLETED = argparse.ArgumentParser(add_help=False)  # is told all verbs and their options
_VERBS = {
    "init": _Verb(
        "Write a folder to begin with: a TOML and data, all of which runs",
        _argument("name", "the folder, which is new or empty", metavar="NAME"),
        _argument("--task", "with a task module of your own", **_FLAG),
    ),
    "train": _Verb(
        "Fine-tune a language model on a task",
        _CONFIG,
        *_NEW_RUN,
        _argument("--dry-run", "check everything and show the plan; start nothing", **_FLAG),
        _OVERRIDES,
    ),
    "mstep": _Verb(
        "Fine-tune a run's language model on rationales of its policy",
        *_NEW_RUN,
        _OVERRIDES,
        _argument("--of NAME", "the run whose policy gives the rationales", required=True),
        module="experiments.em",
    ),
    "em": _Verb(
        "Alternate E-steps and M-steps, each a run",
        *_MEASURING,
        *_NEW_RUN,
        _argument("--rounds N", "an E-step and an M-step each (default: em.rounds)", **_COUNT),
        module=_MANY,
    ),
    "evaluate": _Verb(
        "Score a model, with or without an adapter, on test data",
        *_MEASURING,
        _one_of(
            ("--run NAME", "evaluate the adapter of this run", {}),
            ("--adapter PATH", "evaluate the adapter in this folder", {}),
        ),
        _one_of(
            ("--data FILE", "test files (default: those of the configuration)", _LIST),
            ("--split", "of what is held out (default: test)", {"choices": _SPLITS}),
        ),
    ),
    "compare": _Verb(
        "Compare methods on one task at nearly equal numbers of trajectories",
        *_MEASURING,
        *_NEW_RUN,
        _argument(
            "--methods METHOD",
            "such as base sft ppo gflownet beam; docs/compare.md lists all (default: "
            "compare.methods of the file)",
            **_LIST,
        ),
        _argument("--seeds N", "runs each (default: 3)", default=3, **_COUNT),
        module=_MANY,
    ),
    "posterior": _Verb(
        "Compare a policy with the exact posterior, or bound its distance",
        *_MEASURING,
        _argument("--run NAME", "compare the adapter of this run (default: the base LM)"),
    ),
    "plan": _Verb(
        "Say what a run will need of memory and network, without starting it",
        *_MEASURING,
        _argument("--gpu DEVICE", "that holds the models, such as 24GB, L4 or H100 (default: CPU)"),
    ),
    "export": _Verb(
        "Write a run's policy as a folder that transformers, peft and vLLM load",
        _argument("--run NAME", "whose policy", required=True),
        _argument("--to FOLDER", "a new folder, or empty", required=True),
        _argument("--merge", "fold the adapter into the base", **_FLAG),
        _argument("--dtype", "of the weights (default: as they are)", choices=("bf16", "fp32")),
        _argument("--push REPO", "upload it to this repository of the Hugging Face hub too"),
    ),
    "scale": _Verb(
        "Change the actors or replicas of a run that goes on, and wait",
        _argument("--run NAME", "a run that goes on", required=True),
        _argument("--actors N", "rollout actors from now on", **_COUNT),
        _argument("--reward-replicas R", "reward replicas from now on", **_COUNT),
    ),
    "throughput": _Verb(
        "Measure how a run's rate grows with its rollout actors",
        *_MEASURING,
        _argument(
            "--actors N,N,...",
            "numbers of rollout actors to measure, 1 among them (default: 1,2,4,8)",
            type=_actor_counts,
            default="1,2,4,8",
        ),
        _argument(
            "--engine E,E",
            "rollout engines to compare, native and vllm (default: actors.engine)",
            type=_engines,
        ),
        _argument("--reward-replicas R", "replicas (default: reward.replicas)", **_COUNT),
        _argument(
            "--simulate",
            "waits stand for model compute (throughput.simulation); all else is real",
            **_FLAG,
        ),
        _argument(
            "--output FILE",
            "where the picture goes (default: throughput-TASK.png in the folder of runs)",
        ),
        module=_MANY,
    ),
    "status": _Verb(
        "Show runs: progress, parts that live, last figures",
        _one_of(
            ("--json", "print one JSON object", _FLAG),
            ("--watch", "show it anew each second, until the run has ended", _FLAG),
        ),
        _argument("--run NAME", "one run in full (default: all, a line each)"),
    ),
    "inspect": _Verb(
        "Show the trajectories of a run in a browser",
        _OVERRIDES,
        _argument("--run NAME", "which run (default: the one that goes on, else the newest)"),
        _argument("--port P", "of 127.0.0.1 (default: 8000)", type=int),
        _one_of(
            ("--address A", _ADDRESS.format("the run's"), {}),
            ("--no-serve", "in this process, without Ray", _FLAG),
        ),
        module="inspector.command",
    ),
    "stop": _Verb(
        "Ask a run to checkpoint and end, and wait until it has",
        _argument("--run NAME", "which run (default: the one that runs)"),
    ),
    "completion": _Verb("Print a script with which bash and zsh complete these words", _COMPLETED),
}
_COMPLETED.set_defaults(
    options={
        name: [option for parent in verb.arguments for option in parent._option_string_actions]
        for name, verb in _VERBS.items()
    }
)

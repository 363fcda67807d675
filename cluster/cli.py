"""The command line: verbs, their arguments and the module of each. Imports nothing heavy."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

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


class _Verb(NamedTuple):
    summary: str
    parents: Sequence[argparse.ArgumentParser]
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None
    room: str = "commands"  # of `cluster`; the verb's module there has the verb's name
    module: str = ""  # ... but for the one that would shadow a module of the standard library


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
    name = parser.parse_args(argv[:1]).verb
    verb = _VERBS[name]
    verb_parser = _Parser(
        prog=f"amortize {name}", description=f"{verb.summary}.", parents=verb.parents
    )
    if verb.add_arguments is not None:
        verb.add_arguments(verb_parser)
    # Intermixed, so that overrides may stand before and after options.
    return name, verb_parser.parse_intermixed_args(argv[1:])


def module_of(name: str) -> str:
    """The module that runs a verb."""
    verb = _VERBS[name]
    return f"cluster.{verb.room}.{verb.module or name}"


def _number(text: str) -> int:
    """A number of parts or of runs: at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _actor_counts(text: str) -> tuple[int, ...]:
    """Numbers of actors, ascending; argparse shows the error."""
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


def _shared(*names: str, **settings: Any) -> argparse.ArgumentParser:
    """One argument that several verbs have."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(*names, **settings)
    return parent


_CONFIG = _shared("config", metavar="CONFIG", help="TOML file of the run")
_JSON = _shared("--json", action="store_true", help="print one JSON object")
_OVERRIDES = _shared(
    "overrides",
    metavar="section.key=value",
    nargs="*",
    help="changes to the configuration, before an option of several values; values as in TOML",
)
_NEW_RUN = _shared("--run", metavar="NAME", help="name in runs/ (default: task and time)")
_NEW_RUN.add_argument("--resume", action="store_true", help="go on with what is called --run")
_WHERE = _NEW_RUN.add_mutually_exclusive_group()
_WHERE.add_argument(
    "--address",
    metavar="A",
    help="Ray cluster to use (default: cluster.address, RAY_ADDRESS, else one on this machine)",
)
_WHERE.add_argument("--local", action="store_true", help="one process, without Ray")


def _mstep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--of", metavar="NAME", required=True, help="the run whose policy gives the rationales"
    )


def _em(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=_number,
        help="an E-step and an M-step each (default: em.rounds)",
    )


def _evaluate(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run", metavar="NAME", help="evaluate the adapter of this run")
    which.add_argument("--adapter", metavar="PATH", help="evaluate the adapter in this folder")
    parser.add_argument(
        "--data",
        metavar="FILE",
        nargs="+",
        default=[],
        help="test files (default: those of the configuration)",
    )


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        metavar="METHOD",
        nargs="+",
        default=[],
        help="such as base sft ppo gflownet beam; docs/compare.md lists all (default: "
        "compare.methods of the file)",
    )
    parser.add_argument(
        "--seeds", metavar="N", type=_number, default=3, help="runs each (default: 3)"
    )


def _posterior(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", metavar="NAME", help="compare the adapter of this run (default: the base LM)"
    )


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="NAME", required=True, help="whose policy")
    parser.add_argument("--to", metavar="FOLDER", required=True, help="a new folder, or empty")
    parser.add_argument("--merge", action="store_true", help="fold the adapter into the base")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="of the weights (default: as they are)"
    )
    parser.add_argument(
        "--push", metavar="REPO", help="upload it to this repository of the Hugging Face hub too"
    )


def _scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="NAME", required=True, help="a run that goes on")
    parser.add_argument("--actors", metavar="N", type=_number, help="rollout actors from now on")
    parser.add_argument(
        "--reward-replicas", metavar="R", type=_number, help="reward replicas from now on"
    )


def _throughput(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--actors",
        metavar="N,N,...",
        type=_actor_counts,
        default="1,2,4,8",
        help="numbers of rollout actors to measure, 1 among them (default: 1,2,4,8)",
    )
    parser.add_argument(
        "--reward-replicas",
        metavar="R",
        type=_number,
        help="reward replicas (default: reward.replicas)",
    )
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="waits stand for model compute (throughput.simulation); all else is real",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where the picture goes (default: throughput-TASK.png in the folder of runs)",
    )


def _status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="NAME", help="one run in full (default: all, a line each)")


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", metavar="NAME", help="which run (default: the one that goes on, else the newest)"
    )
    parser.add_argument("--port", metavar="P", type=int, help="of 127.0.0.1 (default: 8000)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--address",
        metavar="A",
        help="Ray cluster to use (default: the run's, RAY_ADDRESS, else one on this machine)",
    )
    where.add_argument("--no-serve", action="store_true", help="in this process, without Ray")


def _stop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="NAME", help="which run (default: the one that runs)")


_MANY = "experiments"
_VERBS = {
    "train": _Verb("Fine-tune a language model on a task", (_CONFIG, _NEW_RUN, _OVERRIDES)),
    "mstep": _Verb(
        "Fine-tune a run's language model on rationales of its policy",
        (_NEW_RUN, _OVERRIDES),
        _mstep,
        _MANY,
    ),
    "em": _Verb(
        "Alternate E-steps and M-steps, each a run",
        (_CONFIG, _NEW_RUN, _JSON, _OVERRIDES),
        _em,
        _MANY,
    ),
    "evaluate": _Verb(
        "Score a model, with or without an adapter, on test data",
        (_CONFIG, _JSON, _OVERRIDES),
        _evaluate,
    ),
    "compare": _Verb(
        "Compare methods on one task at nearly equal numbers of trajectories",
        (_CONFIG, _NEW_RUN, _JSON, _OVERRIDES),
        _compare,
        _MANY,
    ),
    "posterior": _Verb(
        "Compare a policy with the exact posterior, or bound its distance",
        (_CONFIG, _JSON, _OVERRIDES),
        _posterior,
    ),
    "export": _Verb(
        "Write a run's policy as a folder that transformers, peft and vLLM load", (), _export
    ),
    "scale": _Verb("Change the actors or replicas of a run that goes on, and wait", (), _scale),
    "throughput": _Verb(
        "Measure how a run's rate grows with its rollout actors",
        (_CONFIG, _JSON, _OVERRIDES),
        _throughput,
        _MANY,
    ),
    "status": _Verb("Show runs: progress, parts that live, last figures", (_JSON,), _status),
    "inspect": _Verb(
        "Show the trajectories of a run in a browser",
        (_OVERRIDES,),
        _inspect,
        "inspector",
        "command",
    ),
    "stop": _Verb("Ask a run to checkpoint and end, and wait until it has", (), _stop),
}

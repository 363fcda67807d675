"""The command line: verbs and their arguments. Imports nothing heavy."""

import argparse
from collections.abc import Callable, Sequence

_DESCRIPTION = """\
Amortized Bayesian inference in language models: GFlowNet fine-tuning as a distributed
actor-learner system.

verbs:
{verbs}

'amortize VERB --help' says more of each."""


def parse(argv: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """The verb and its arguments; exits with a message where they are wrong."""
    listing = "\n".join(f"  {verb:<12}{summary}" for verb, (summary, _) in _VERBS.items())
    parser = argparse.ArgumentParser(
        prog="amortize",
        usage="amortize VERB ...",
        description=_DESCRIPTION.format(verbs=listing),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=list(_VERBS), metavar="VERB", help=argparse.SUPPRESS)
    verb = parser.parse_args(argv[:1]).verb
    summary, add_arguments = _VERBS[verb]
    verb_parser = argparse.ArgumentParser(prog=f"amortize {verb}", description=f"{summary}.")
    add_arguments(verb_parser)
    # Intermixed, so that overrides may stand before and after options.
    return verb, verb_parser.parse_intermixed_args(argv[1:])


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="TOML file of the run")
    _run_and_where(parser)


def _run_and_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="NAME", help="name in runs/ (default: task and time)")
    parser.add_argument("--resume", action="store_true", help="go on with the run called --run")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--address",
        metavar="A",
        help="Ray cluster to use (default: cluster.address, RAY_ADDRESS, else one on this machine)",
    )
    where.add_argument("--local", action="store_true", help="one process, without Ray")
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="changes to the configuration, values as in TOML",
    )


def _em(parser: argparse.ArgumentParser) -> None:
    _train(parser)
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=_number,
        help="an E-step and an M-step each (default: em.rounds)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _mstep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--of", metavar="NAME", required=True, help="the run whose policy gives the rationales"
    )
    _run_and_where(parser)


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="TOML file of the run")
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
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="changes to the configuration, before --data, values as in TOML",
    )


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="TOML file of the run")
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
    parser.add_argument("--run", metavar="NAME", help="name in runs/ (default: task and time)")
    parser.add_argument("--resume", action="store_true", help="go on with the one called --run")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--address", metavar="A", help="Ray cluster to use, as for train")
    where.add_argument("--local", action="store_true", help="one process, without Ray")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="changes to the configuration, before --methods, values as in TOML",
    )


def _posterior(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="TOML file of the run")
    parser.add_argument(
        "--run", metavar="NAME", help="compare the adapter of this run (default: the base LM)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="changes to the configuration, values as in TOML",
    )


def _scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="NAME", required=True, help="a run that goes on")
    parser.add_argument("--actors", metavar="N", type=_number, help="rollout actors from now on")
    parser.add_argument(
        "--reward-replicas", metavar="R", type=_number, help="reward replicas from now on"
    )


def _number(text: str) -> int:
    """A number of parts or of runs: at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _throughput(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="TOML file of the run")
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
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="changes to the configuration, values as in TOML",
    )


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


def _status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="NAME", help="one run in full (default: all, a line each)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


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
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="changes to the run's configuration, such as buffer.password",
    )


def _stop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="NAME", help="which run (default: the one that runs)")


_VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "train": ("Fine-tune a language model on a task", _train),
    "mstep": ("Fine-tune a run's language model on rationales of its policy", _mstep),
    "em": ("Alternate E-steps and M-steps, each a run", _em),
    "evaluate": ("Score a model, with or without an adapter, on test data", _evaluate),
    "compare": ("Compare methods on one task at nearly equal numbers of trajectories", _compare),
    "posterior": ("Compare a policy with the exact posterior, or bound its distance", _posterior),
    "scale": ("Change the actors or replicas of a run that goes on, and wait for it", _scale),
    "throughput": ("Measure how a run's rate grows with its rollout actors", _throughput),
    "status": ("Show runs: progress, parts that live, last figures", _status),
    "inspect": ("Show the trajectories of a run in a browser", _inspect),
    "stop": ("Ask a run to checkpoint and end, and wait until it has", _stop),
}

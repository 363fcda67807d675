"""What a run cannot change when it goes on: everything that decides a log-reward or a record.

Its buffer holds what was scored before. With another reward, other legal texts or other data, old
and new would be mixed in silence. Whatever is not known to be harmless counts.
"""

import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from cluster.config.file import load_config
from cluster.config.project import PACKAGES, UserError
from cluster.config.schema import RunConfig
from cluster.run.directory import RunDirectory, write_whole
from reward.checks import FUNCTION
from tasks.config import QuestionsConfig
from tasks.custom_config import CustomTaskConfig

# Which prompts come how often, what is measured, where and how fast models run. Base weights and
# adapter are compared as such, wherever they lie.
_HARMLESS: Mapping[str, frozenset[str]] = {
    "task": frozenset(
        {"tests", "embedder", "demonstration_weight", "question_weight"}
        | {"hinted_draws", "tool_deadline_s"}
    ),
    "lm": frozenset({"model", "device", "trust_remote_code"}),
    "reward": frozenset(
        {"replicas", "ranks", "token_budget", "deadline_s", "cache_items"}
        | {"verifier_processes", "verifier_deadline_s"}
    ),
}
# Runs that began before there were these keys had none of what they add.
_ADDED = frozenset({"reward.terms", "task.wrong_label_penalty"})
_SOURCE = "(its source)"


def identity_of_run(config: RunConfig, weights: Mapping[str, str]) -> dict[str, Any]:
    """Dotted key -> JSON value; of a file that a task names, the digest of its content.

    `weights`: what a checkpoint is known by, see `cluster.run.assembly.identity_of`.
    """
    identity: dict[str, Any] = dict(weights)
    for section in _HARMLESS:
        settings = getattr(config, section).model_dump(mode="json")
        for name, value in settings.items():
            if _counts(key := f"{section}.{name}", value):
                identity[key] = _content(value)
    if isinstance(config.task, CustomTaskConfig):
        source = sys.modules[type(config.task).__module__].__file__
        identity[f"task.name {_SOURCE}"] = _content(source)
    return identity | _sources_of_checks(config)


def check_same_run(
    directory: RunDirectory, identity: Mapping[str, Any], weights: Mapping[str, str]
) -> None:
    """Raise UserError unless a run that goes on is the one that was begun; changes nothing."""
    try:
        kept: dict[str, Any] = json.loads(directory.identity_file.read_text())
    except FileNotFoundError:  # of a run that is older than this file
        kept = identity_of_run(load_config(str(directory.config_file)), weights)
    for key in dict.fromkeys([*kept, *identity]):
        before, now = kept.get(key), identity.get(key)
        if key == "base" and not (before and now):  # a driver had not its weights
            continue
        known = key in kept or not key.endswith(_SOURCE)  # older runs kept none of a check's
        if before != now and known and (_counts(key, before) or _counts(key, now)):
            content = "digest " if "sha256:" in f"{before}{now}" else ""
            raise UserError(
                f"run {directory.name!r} was begun with {key} = {content}{before}, and {content}"
                f"{now} is asked for now: what its buffer and its checkpoints hold would not fit "
                f"what is to come. Resume it as it was ({directory.config_file}), or begin another "
                f"run"
            )


def keep_identity(directory: RunDirectory, identity: Mapping[str, Any]) -> None:
    """Write down what the run is, once; runs that go on are compared with it."""
    if not directory.identity_file.exists():
        write_whole(directory.identity_file, json.dumps(identity, indent=1))


def _sources_of_checks(config: RunConfig) -> dict[str, str]:
    """Digests of the modules of verifiers and tools, found as their processes do; none imported.

    Of a module in a package of one's own, beside it those of the whole package, which it may use.
    """
    named = [term.check or "" for term in config.reward.terms]
    named += config.task.tools if isinstance(config.task, QuestionsConfig) else ()
    found = {}
    for name, function in ((name, FUNCTION.fullmatch(name)) for name in named):
        file = f"{function[1].replace('.', '/')}.py" if function else ""
        for place in (*filter(None, sys.path), os.getcwd()) if file else ():
            if os.path.isfile(source := os.path.abspath(os.path.join(place, file))):
                found[f"{name} {_SOURCE}"] = _content(source)
                break
    for folder in filter(Path.is_dir, own_sources(config)):
        found[f"{folder.name} {_SOURCE}"] = _digest(folder, sorted(folder.rglob("*.py")))
    return found


def own_sources(config: RunConfig) -> list[Path]:
    """Files of the modules, or folders of the packages, that a user's own task, verifiers and tools
    are from.

    None of what ships, and of what is installed, which every node has to have installed.
    """
    names = [str(term.check) for term in config.reward.terms]
    names += [config.task.name, *getattr(config.task, "tools", ())]
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    found: dict[Path, None] = {}
    for package in (name.partition(":")[0].partition(".")[0] for name in names if ":" in name):
        spec = PathFinder.find_spec(package, [*sys.path, os.getcwd()])
        if spec is None or package in PACKAGES:
            continue
        places = spec.submodule_search_locations or [str(spec.origin)]
        path = Path(next(iter(places))).resolve()
        if not installed & set(path.parents):
            found[path] = None
    return list(found)


def _counts(key: str, value: Any) -> bool:
    section, _, name = key.partition(".")
    return name not in _HARMLESS.get(section, ()) and bool(value or key not in _ADDED)


def _content(value: Any) -> Any:
    """A value, with the names of files replaced by what the files hold."""
    if isinstance(value, list):
        return [_content(item) for item in value]
    if isinstance(value, dict):
        return {key: _content(item) for key, item in value.items()}
    if not isinstance(value, str) or not os.path.isabs(value) or not os.path.exists(value):
        return value
    path = Path(value)
    return _digest(path, sorted(path.rglob("*")) if path.is_dir() else [path])


def _digest(place: Path, files: Sequence[Path]) -> str:
    """Of names, as seen from `place`, and contents of the files."""
    digest = hashlib.sha256()
    for file in (file for file in files if file.is_file()):
        digest.update(f"{file.relative_to(place)}\n".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return f"sha256:{digest.hexdigest()[:16]}"

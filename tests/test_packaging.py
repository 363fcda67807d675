"""Installing: the wheel works outside the tree, the pins cover what is asked for."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = ("actors", "buffer", "cluster", "learner", "lm", "reward", "seed_lm", "tasks")


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name_of(name): version for name, version in pairs}


def test_every_dependency_is_pinned_exactly() -> None:
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    missing = {name_of(one) for one in wanted} - pins().keys()
    assert not missing


def test_no_pin_is_of_one_build_only() -> None:
    # torch==2.13.0+cpu would keep a machine with a GPU from using it.
    assert not [version for version in pins().values() if "+" in version]


def test_every_import_of_the_packages_is_a_declared_dependency() -> None:
    declared = {name_of(one).replace("-", "_") for one in PROJECT["dependencies"]}
    known = declared | {*PACKAGES, "pydantic_core"} | sys.stdlib_module_names
    # In a module that is imported where its engine is asked for, and nowhere else.
    extras = {"actors/vllm_engine.py": {"vllm"}}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            place = str(path.relative_to(ROOT))
            foreign = {name.partition(".")[0] for name in names} - known
            foreign -= extras.get(place, set())
            assert not foreign, f"{place}: {foreign}"


@pytest.mark.slow
def test_the_wheel_holds_code_and_data_and_works_outside_the_tree(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        # Isolated, the build would download its backend.
        [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        check=True,
    )
    (wheel,) = tmp_path.glob("amortize-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
    for data in (
        "tasks/arithmetic.toml",
        "buffer/lua/",
        "cluster/inspector/templates/",
        "cluster/reports/templates/",
    ):
        assert any(name.startswith(data) for name in names), data
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    code = (
        "import cluster.__main__, cluster.config.file as c\n"
        f"assert c.__file__.startswith({str(site)!r}), c.__file__\n"
        "c.load_config('tasks/arithmetic.toml')"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        check=True,
    )
    help_text = subprocess.run(
        [str(site / "bin" / "amortize"), "--help"],
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "evaluate" in help_text.stdout

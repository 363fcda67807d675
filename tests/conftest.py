"""What holds for every test: its environment, its pace, its time, and where it may be skipped."""

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.environment import ALL, OwnEnvironment

# Plugins are imported after this module, and so is all of ours, in the tests' own environment.
ENVIRONMENT = OwnEnvironment()
PLUGINS = ("tests.tiny_lm", "tests.stores")
# A fifth of the time of all imports would go to looking for garbage among them.
gc.disable()

settings.register_profile(
    "any machine",
    # How fast examples come says how busy the machine is, and nothing of the code.
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("any machine")

# Setup included, which of many is the start of Ray.
SLOW_TIMEOUT_S = 400


@pytest.fixture(scope="session", autouse=True)
def own_working_directory() -> Iterator[None]:
    """Tests stand in an empty folder; not before they run, as pytest starts its workers here."""
    before = Path.cwd()
    os.chdir(ENVIRONMENT.working_directory)
    yield
    os.chdir(before)


def pytest_configure(config: pytest.Config) -> None:
    """Have the plugins where tests run: who only hands tests out to workers needs no torch."""
    if not config.getoption("numprocesses", default=None):
        for name in PLUGINS:
            config.pluginmanager.import_plugin(name)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file without a test of the pace that is asked for, where few files have one."""
    pace = config.getoption("pace")
    if pace in (None, "fast") or collection_path.suffix != ".py":
        return None
    return f"mark.{pace}" not in collection_path.read_text(encoding="utf-8") or None


def pytest_collection_finish() -> None:
    """Look for garbage from now on, but not in what was imported, which stays."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    ENVIRONMENT.remove()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and ALL in os.environ and not item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"{ALL} is set, but the test was skipped: {report.longrepr}"
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pace", choices=("fast", "slow"), help="only tests of this pace")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give slow tests the time that they need, and keep tests of one pace where asked to.

    The slow ones that may take longest come first, so that whoever runs several at once is not left
    with a long one in the end.
    """
    for item in items:
        if pace_of(item) == "slow" and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))
    if (pace := config.getoption("pace")) is None:
        return
    chosen: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        chosen[pace_of(item) == pace].append(item)
    if pace == "slow":
        chosen[True].sort(key=time_limit_s, reverse=True)
    items[:] = chosen[True]
    config.hook.pytest_deselected(items=chosen[False])


def pace_of(item: pytest.Item) -> str:
    return "fast" if item.get_closest_marker("slow") is None else "slow"


def time_limit_s(item: pytest.Item) -> float:
    limit = item.get_closest_marker("timeout")
    assert limit is not None
    return float(limit.args[0])

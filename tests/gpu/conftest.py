"""The GPU session: it runs when JAX_FA3_REQUIRE_GPU asks for it (see ../conftest.py), fails where
there is no Hopper GPU, and writes the record of a whole run. What needs several GPUs is a suite of
its own, collected where it is named."""

import pathlib
import time

import pytest
import record

collect_ignore = ["test_mesh.py"]
LONGEST = ("test_sizes.py", "test_sanitizer.py", "test_determinism.py", "test_flex.py")


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no worker of pytest-xdist is alone with them in the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_configure(config):
    config.pluginmanager.register(Recorder(config), "gpu-record")


@pytest.fixture(scope="session", autouse=True)
def hopper():
    """Ends the session where the kernels cannot run: never a skip."""
    from jax_fa3 import route

    reason = route.device_reason()
    if reason:
        pytest.exit(f"JAX_FA3_REQUIRE_GPU is set, but {reason}", returncode=1)


class Recorder:
    """Counts outcomes and writes the record of a suite when nothing of it was left out."""

    def __init__(self, config):
        self.config, self.start = config, time.monotonic()
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.skipped, self.left_out = {}, []

    def pytest_deselected(self, items):
        self.left_out += [item.nodeid for item in items]

    def pytest_collectreport(self, report):
        if report.failed:
            self.counts["failed"] += 1

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.skipped:
            self.skipped[report.nodeid] = str(report.longrepr[-1])

    def whole_suite(self, session):
        """The suite that was run from end to end, if one was."""
        option = self.config.option  # what workers of pytest-xdist deselect is not seen here
        whole = (
            not self.left_out
            and not (option.keyword or option.markexpr or option.deselect)
            and not session.shouldstop
            and not session.shouldfail
            and sum(self.counts.values()) >= session.testscollected > 0
        )
        arguments = [pathlib.Path(argument).resolve() for argument in self.config.args]
        named = [x for x in record.SUITES.values() if arguments == [record.ROOT / x.tests]]
        return named[0] if named and whole else None

    def pytest_sessionfinish(self, session):
        suite = self.whole_suite(session)
        if suite:
            record.write(suite, self.counts, self.skipped, time.monotonic() - self.start)

"""The GPU session: it runs when JAX_FA3_REQUIRE_GPU asks for it (see ../conftest.py), fails where
there is no Hopper GPU, and writes the record when all tests are done, in one run or in several.
What needs several GPUs is a suite of its own, collected where it is named."""

import pathlib

import pytest
import record

collect_ignore = ["test_mesh.py"]
LONGEST = ("test_sizes.py", "test_sanitizer.py", "test_determinism.py", "test_flex.py")


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no worker of pytest-xdist is alone with them in the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_configure(config):
    if suite := whole_suite(config):
        config.pluginmanager.register(Recorder(config, suite), "gpu-record")


def whole_suite(config):
    """The suite that pytest is asked for from end to end, if it is asked for one."""
    option = config.option
    if option.keyword or option.markexpr or option.deselect:
        return None
    arguments = [pathlib.Path(argument).resolve() for argument in config.args]
    named = [x for x in record.SUITES.values() if arguments == [record.ROOT / x.tests]]
    return named[0] if named else None


@pytest.fixture(scope="session", autouse=True)
def hopper():
    """Ends the session where the kernels cannot run: never a skip."""
    from jax_fa3 import route

    reason = route.device_reason()
    if reason:
        pytest.exit(f"JAX_FA3_REQUIRE_GPU is set, but {reason}", returncode=1)


class Recorder:
    """Leaves out what an earlier run of the same tree has done, keeps what each test comes to, and
    writes the record when there is nothing left."""

    def __init__(self, config, suite):
        self.suite, self.progress = suite, record.Progress(suite)
        self.is_worker = hasattr(config, "workerinput")  # of pytest-xdist: its controller writes
        self.ran, self.has_left_out = set(), False
        if not self.is_worker:
            self.progress.begin()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid not in self.progress.outcomes]

    def pytest_report_header(self):
        done = len(self.progress.outcomes)
        return f"{self.suite.tests}: {done} tests were done by an earlier run" if done else None

    def pytest_deselected(self, items):
        self.has_left_out |= bool(items)

    def pytest_collectreport(self, report):
        if report.failed and not self.is_worker:
            self.progress.add(report.nodeid, "failed")

    def pytest_runtest_logreport(self, report):
        if self.is_worker or (report.when != "call" and report.outcome == "passed"):
            return
        self.ran.add(report.nodeid)
        reason = str(report.longrepr[-1]) if report.skipped else None
        self.progress.add(report.nodeid, report.outcome, reason)

    def pytest_sessionfinish(self, session):
        stopped = session.shouldstop or session.shouldfail or self.has_left_out
        if self.is_worker or stopped or len(self.ran) < session.testscollected:
            return
        if self.progress.outcomes:
            of = self.progress
            record.write(self.suite, of.counts(), of.reasons, of.seconds)
            of.end()

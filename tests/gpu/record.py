"""Records: proof that a GPU suite passed on these very sources.

    make gpu-test, make gpu-mesh-test    write theirs at the end of a whole run
    python tests/gpu/record.py --check [gpu|mesh]
                                         fails unless it fits the source tree and nothing failed

A run that is ended early leaves a file of progress: the next one goes on from there, and the record
is of all tests. The check needs neither JAX nor a GPU.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "numpy")
KERNEL_SOURCES = ("src/**/*", "cmake/**/*", "CMakeLists.txt")
EVERYTHING = (*KERNEL_SOURCES, "jax_fa3/**/*.py", "tests/**/*.py")


class Suite(NamedTuple):
    """A part of the GPU tests that is run as a whole; paths are those of the repository."""

    tests: str  # what pytest is given
    record: str
    target: str  # of make
    sources: tuple[str, ...]  # what the hash covers


SUITES = {
    "gpu": Suite("tests/gpu", "tests/gpu/RECORD.json", "gpu-test", KERNEL_SOURCES),
    "mesh": Suite(
        "tests/gpu/test_mesh.py",
        "tests/gpu/MESH_RECORD.json",
        "gpu-mesh-test",
        (*KERNEL_SOURCES, "jax_fa3/**/*.py"),
    ),
}


def tree_hash(patterns, root):
    """SHA-256 over the relative names and contents of files, in a fixed order."""
    digest = hashlib.sha256()
    for path in sorted(x for pattern in patterns for x in root.glob(pattern) if x.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def source_hash(suite, root=ROOT):
    return tree_hash(suite.sources, root)


def driver_version():
    """The driver as nvidia-smi names it, or why it cannot be known."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({type(error).__name__})"


def package_versions():
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


class Progress:
    """What the tests of a suite came to on one tree, tests included, with one driver: a file with a
    line for each, which is read again when the suite is run again."""

    def __init__(self, suite, root=ROOT):
        self.path = (root / suite.record).with_suffix(".progress")
        self.of = dict(tree=tree_hash(EVERYTHING, root), driver=driver_version())
        self.outcomes = {}  # by test: "passed", "failed" or "skipped"
        self.reasons = {}  # of those that were skipped
        self.seconds = 0.0  # of all runs so far
        self.start = time.monotonic()
        self.earlier_seconds = 0.0
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows = list(filter(None, map(_row, lines)))
        self.fits = rows[:1] == [self.of]
        for row in rows[1:] if self.fits else ():
            self._take(**row)

    def begin(self):
        """Before the tests, by the one process that adds their outcomes."""
        self.earlier_seconds = self.seconds
        with self.path.open("a" if self.fits else "w") as file:
            file.write("\n" if self.fits else json.dumps(self.of) + "\n")

    def add(self, test, outcome, reason=None):
        seconds = self.earlier_seconds + time.monotonic() - self.start
        row = dict(test=test, outcome=outcome, reason=reason, seconds=round(seconds, 1))
        self._take(**row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def counts(self):
        found = list(self.outcomes.values())
        return {outcome: found.count(outcome) for outcome in ("passed", "failed", "skipped")}

    def end(self):
        self.path.unlink(missing_ok=True)

    def _take(self, test, outcome, reason, seconds):
        self.outcomes[test], self.seconds = outcome, seconds
        if outcome == "skipped":
            self.reasons[test] = reason


def _row(line):
    """A line of a file of progress; None if the process ended while it was written."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def write(suite, counts, skipped, seconds, root=ROOT):
    """Write the record of a finished run; `skipped` maps test names to reasons."""
    import jax

    devices = jax.devices()
    device = devices[0]
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "source_hash": source_hash(suite, root),
        "gpu": device.device_kind,
        "gpus": len(devices),
        "driver": driver_version(),
        "platform": " ".join(device.client.platform_version.split()),
        "python": sys.version.split()[0],
        "packages": package_versions(),
        "counts": counts,
        "skipped": skipped,
        "seconds": round(seconds),
    }
    (root / suite.record).write_text(json.dumps(record, indent=2) + "\n")


def problems(suite, root=ROOT):
    """Why a suite's record does not vouch for the source tree; empty when it does."""
    try:
        record = json.loads((root / suite.record).read_text())
    except OSError as error:
        advice = f"run `make {suite.target}` on a Hopper machine"
        return [f"{suite.record} cannot be read ({error}): {advice}"]
    except ValueError as error:
        return [f"{suite.record} is not JSON: {error}"]
    found, current = [], source_hash(suite, root)
    if record.get("source_hash") != current:
        found.append(
            f"{suite.record} is for source {str(record.get('source_hash'))[:12]}, the tree is "
            f"{current[:12]}: run `make {suite.target}` again"
        )
    counts = record.get("counts", {})
    if counts.get("failed") != 0:
        found.append(f"{suite.record} has {counts.get('failed')} failed tests, expected 0")
    if not counts.get("passed"):
        found.append(f"{suite.record} has {counts.get('passed')} passed tests, expected some")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail unless the record fits")
    parser.add_argument("suite", nargs="?", choices=SUITES, default="gpu")
    arguments = parser.parse_args()
    suite = SUITES[arguments.suite]
    if not arguments.check:
        print(source_hash(suite))
        return 0
    found = problems(suite)
    print("\n".join(found) or f"{suite.record} fits the source.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

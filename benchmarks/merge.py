"""Saved runs of one benchmark, of different problems, as one: what --merge does."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.environment import save


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="JSON", help="measure nothing: join saved runs"
    )


def merged(runs: list[dict]) -> dict:
    """The records of all runs, with the rest of the first. ValueError unless commit, device and
    driver are the same."""
    facts = {tuple(run["environment"][x] for x in ("commit", "device", "driver")) for run in runs}
    if len(facts) > 1:
        raise ValueError(f"the runs differ in commit, device or driver: {sorted(facts)}")
    lists = {name: [x for run in runs for x in run[name]] for name in ("skipped", "records")}
    return runs[0] | lists


def merge(paths: list[Path], result: Path, write: Callable[[dict, Path], str]) -> str:
    """Joins the runs at `paths` in the JSON file `result`; returns the report that
    write(data, folder) makes of them."""
    data = merged([json.loads(path.read_text()) for path in paths])
    save(data, result)
    return write(data, result.parent)

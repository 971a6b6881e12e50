"""The reliability campaign: parts of many checks each, on a Hopper GPU, into one file of results.

    make campaign                                   # every part, for as long as it takes
    make campaign PARTS="forward hostile"           # these parts
    python tests/gpu/campaign.py --budget-s 500     # starts no task after so many seconds
    python tests/gpu/campaign.py --processes 1      # one task at a time; else one for each core
    python tests/gpu/campaign.py --retry            # tasks with failures again, then what is left
    python tests/gpu/campaign.py --render           # the table of docs/reliability.md

A part has tasks. The results are saved after each task, and a run goes on where the last one ended.
They belong to one source tree: a run on another one ends with an error, unless --again drops them.
A check that fails is written down, and the campaign goes on. Most of its time is the oracle's, so
that tasks run in processes that share the GPUs, but for those of parts that run alone.
"""

import argparse
import concurrent.futures
import datetime
import itertools
import json
import multiprocessing
import os
import pathlib
import sys
import time
import traceback

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
import gpu_in_turn  # noqa: E402

if __name__ in ("__main__", "__mp_main__"):  # before JAX is imported, here and in each process
    # Processes take the GPUs in turn and share their memory; each has one core.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if __name__ == "__mp_main__":  # "SpawnProcess-" and a number
        gpu_in_turn.take_gpu(int(multiprocessing.current_process().name.rsplit("-", 1)[1]))
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_force_compilation_parallelism=1")
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import campaign_parts  # noqa: E402
import record  # noqa: E402

RESULTS = HERE / "CAMPAIGN.json"
PAGE = record.ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"
SOURCES = record.SUITES["mesh"]  # kernels and Python
MAX_FAILURES = 20  # of a part that are written down with their text


class Results:
    """What the file holds: environment, and for each part tasks, checks, failures, seconds."""

    def __init__(self, path, environment, again=False):
        self.path = path
        self.data = dict(environment=environment, parts={})
        if again or not path.exists():
            return
        saved = json.loads(path.read_text())
        for name in ("source_hash", "gpu"):
            was, is_now = (x[name][:12] for x in (saved["environment"], environment))
            if was != is_now:
                raise SystemExit(
                    f"{path} is for {name} {was}, this is {is_now}: --again drops its results"
                )
        self.data = saved

    def part(self, name):
        empty = dict(tasks=[], checks=0, failed=0, failures=[], seconds=0.0)
        return self.data["parts"].setdefault(name, empty)

    def add(self, name, task, checks, failures, seconds):
        part = self.part(name)
        part["tasks"].append(task)
        part["checks"] += checks
        part["failed"] += len(failures)
        room = MAX_FAILURES - len(part["failures"])
        part["failures"] += [dict(task=task, checks=checks, text=x) for x in failures[:room]]
        part["seconds"] = round(part["seconds"] + seconds, 1)
        new = self.path.with_suffix(".part")
        new.write_text(json.dumps(self.data, indent=1) + "\n")
        new.replace(self.path)

    def drop_failures(self, name):
        """Forgets the tasks of a part that had failures; all, if some failures are not kept."""
        part = self.part(name)
        if part["failed"] > len(part["failures"]):
            del self.data["parts"][name]
            return
        checks = {x["task"]: x["checks"] for x in part["failures"]}
        part["tasks"] = [x for x in part["tasks"] if x not in checks]
        part.update(checks=part["checks"] - sum(checks.values()), failed=0, failures=[])

    @property
    def failed(self):
        return sum(part["failed"] for part in self.data["parts"].values())


def environment():
    """What the results are of."""
    import jax

    return dict(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        source_hash=record.source_hash(SOURCES),
        gpu=jax.devices()[0].device_kind,
        driver=record.driver_version(),
        packages=record.package_versions(),
    )


def run_task(part, task):
    """The number of checks, the texts of those that failed, and seconds; an error ends the task."""
    checks, failures, start = 0, [], time.monotonic()
    try:
        for count, failure in part.run(task, part.checks_of_a_task):
            checks += count
            failures += [failure] if failure else []
    except Exception:
        checks += 1
        failures.append(traceback.format_exc())
    return checks, failures, time.monotonic() - start


def one_by_one(tasks, time_is_out):
    """(part, task, result of run_task) of each."""
    for part, task in tasks:
        if time_is_out():
            return
        yield part, task, run_task(part, task)


def in_processes(tasks, time_is_out, processes):
    """The same, as tasks end; a process that dies ends the campaign with an error."""
    spawn = multiprocessing.get_context("spawn")  # a fork would share the parent's CUDA context
    waiting, running = iter(tasks), {}
    with concurrent.futures.ProcessPoolExecutor(processes, spawn) as pool:
        while True:
            while len(running) < processes and not time_is_out() and (task := next(waiting, None)):
                running[pool.submit(run_task, *task)] = task
            if not running:
                return
            ended, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in ended:
                yield *running.pop(future), future.result()


def run(parts, results, budget_s, log=print, processes=1):
    """Runs the tasks of the parts that are not done yet."""
    start = time.monotonic()

    def time_is_out():
        return time.monotonic() - start > budget_s

    left = [
        (part, task)
        for part in parts
        for task in sorted(set(range(part.tasks)) - set(results.part(part.name)["tasks"]))
    ]
    shared = [x for x in left if processes > 1 and not x[0].alone]
    alone = [x for x in left if x not in shared]
    done = 0
    for part, task, found in itertools.chain(
        in_processes(shared, time_is_out, processes) if shared else (),
        one_by_one(alone, time_is_out),
    ):
        checks, failures, seconds = found
        results.add(part.name, task, checks, failures, seconds)
        done += 1
        log(f"{part.name} {task + 1}/{part.tasks}: {checks} {part.unit}, {seconds:.1f} s")
        for failure in failures:
            log(f"FAILED {failure}")
    if done < len(left):
        log("out of time: run again to go on")


def render(data, parts):
    """The part of the page that shows results; `data` is None where there are none."""
    if data is None:
        return "The campaign of this version has not been run.\n"
    rows = ["| part | done | wanted | failed | seconds |", "|---|---|---|---|---|"]
    for part in parts:
        if found := data["parts"].get(part.name):
            rows.append(
                f"| {part.name} | {found['checks']:,} {part.unit} | {part.goal:,} "
                f"| {found['failed']} | {found['seconds']:.0f} |"
            )
    of = data["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in of["packages"].items())
    head = f"{of['date']}, {of['gpu']}, driver {of['driver']}, {packages}"
    return f"{head}, source {of['source_hash'][:12]}.\n\n" + "\n".join(rows) + "\n"


def rendered_page(text, results):
    """The page with the results in their place."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return before + BEGIN + results + END + after


def saved(path=RESULTS):
    return json.loads(path.read_text()) if path.exists() else None


def main(arguments=None):
    parts = {part.name: part for part in campaign_parts.PARTS}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}")
    parser.add_argument("--budget-s", type=float, default=float("inf"))
    parser.add_argument("--scale", type=float, default=1.0, help="share of each task's checks")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="tasks at a time; default: the cores"
    )
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="drop the results that are there")
    parser.add_argument("--retry", action="store_true", help="run tasks again that had failures")
    parser.add_argument("--render", action="store_true", help="write docs/reliability.md, no more")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.parts if name not in parts]:
        parser.error(f"no part {', '.join(unknown)}; expected some of {', '.join(parts)}")
    if args.render:
        results = render(saved(args.results), campaign_parts.PARTS)
        PAGE.write_text(rendered_page(PAGE.read_text(), results))
        return 0
    here = campaign_parts.IS_HOPPER
    chosen = [parts[name].scaled(args.scale) for name in args.parts or parts]
    if left := [part.name for part in chosen if part.needs_gpu and not here]:
        print(f"left out without a Hopper GPU: {', '.join(left)}")
    results = Results(args.results, environment(), args.again)
    able = [part for part in chosen if here or not part.needs_gpu]
    if args.retry:
        for part in able:
            results.drop_failures(part.name)
    run(able, results, args.budget_s, processes=args.processes)
    print(f"{results.failed} checks failed")
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())

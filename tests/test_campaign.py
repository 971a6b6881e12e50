"""The reliability campaign: its bookkeeping, and the parts that run without a GPU on few checks."""

import dataclasses
import itertools
import json
import multiprocessing
import re
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import campaign
import campaign_parts
from campaign_parts import PARTS, Part

import contract

HERE = dict(source_hash="a" * 64, gpu="a GPU", date="today", driver="1", packages=dict(jax="0"))
BY_NAME = {part.name: part for part in PARTS}


def part_of(run, name="p", goal=6, tasks=3):
    return Part(name, "", "checks", goal, tasks, run)


def passes(task, checks):
    yield from [(1, None)] * checks


def range_of(task, checks):
    """A failure in one task; each is of a process that is not this one."""
    assert multiprocessing.parent_process() is not None
    yield checks, "task 7 of another" if task == 7 else None


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.json"


def test_functions_are_drawn_anew():
    """Others than the suite's; they need the kernels."""
    with mock.patch("flex_checks.check_random") as check:
        assert list(BY_NAME["functions"].run(2, 3)) == [(1, None)] * 3
    assert [x.args for x in check.call_args_list] == [(1006,), (1007,), (1008,)]


@pytest.mark.parametrize(
    ("name", "task", "checks"),
    [
        ("forward", 3, 2),
        ("backward", 6, 2),
        ("poison", 9, 2),
        ("hostile", 1, 3),
        ("pages", 0, 2),
        ("soak", 0, 20),
        ("threads", 0, 4),
    ],
)
def test_parts(name, task, checks):
    part = dataclasses.replace(BY_NAME[name], goal=checks, tasks=1)
    verdicts = list(part.run(task, part.checks_of_a_task))
    assert sum(count for count, _ in verdicts) == checks
    assert [failure for _, failure in verdicts if failure] == []


def test_a_wrong_output_is_seen(monkeypatch):
    real = campaign_parts.compile_forward

    def wrong(case):
        executable = real(case)
        return lambda *x: {name: y * 1.05 for name, y in executable(*x).items()}

    monkeypatch.setattr(campaign_parts, "compile_forward", wrong)
    ((count, failure),) = campaign_parts.forward(3, 1)
    assert count == 1 and "error" in failure and "Dense(batch=" in failure


def test_a_launch_with_other_bits_is_seen(monkeypatch):
    turns = itertools.count()

    def chain(query, key, value, length=10):
        turn = jax.pure_callback(
            lambda _: np.int32(next(turns)), jax.ShapeDtypeStruct((), jnp.int32), query
        )
        return query.at[0, 3, 1, 2].add((turn == 4).astype(query.dtype))

    monkeypatch.setattr(campaign_parts, "chain", chain)
    failures = [failure for _, failure in campaign_parts.soak(0, 80) if failure]
    assert failures == ["1 runs of 10 launches had other bits"]


@pytest.mark.parametrize("target", ["jax_fa3_forward", "jax_fa3_backward"])
def test_damages_reach_the_custom_call(monkeypatch, target):
    """As a program for a GPU has it; each damage makes another one."""
    monkeypatch.setattr(campaign_parts, "IMPLEMENTATION", contract.Implementation(None))
    inputs = campaign_parts.small_inputs(0, seqlen=16)

    def loss(*x):
        return campaign_parts.chain(*x, length=1).astype(jnp.float32).sum()

    def call():
        """The custom call's line in the lowered text, without the names of values."""
        jax.clear_caches()
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*inputs)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        (line,) = (line for line in text.splitlines() if f"@{target}(" in line)
        return re.sub(r"%[a-z0-9_#:]+", "", line.split(f"@{target}")[1])

    texts = [call()]
    for damage in campaign_parts.DAMAGES.values():
        ffi_call = campaign_parts.damaged(target, damage)
        with mock.patch.object(jax.ffi, "ffi_call", ffi_call):
            texts.append(call())
    jax.clear_caches()
    assert len(set(texts)) == 1 + len(campaign_parts.DAMAGES)


def test_goals():
    """What is documented, of at least 300 programs that differ."""
    assert BY_NAME["forward"].goal == 20_000 and BY_NAME["backward"].goal == 10_000
    assert len({campaign_parts.problem_of(task).name for task in range(400)}) == 400
    assert BY_NAME["faults"].tasks == 2 * len(campaign_parts.DAMAGES) == 30
    page = campaign.PAGE.read_text()
    for part in PARTS:
        assert f"\n| {part.name} | " in page, part.name


def test_problems_vary_in_what_runs_do_not_compile():
    case = next(
        case
        for task in range(400)
        if (case := campaign_parts.problem_of(task)).query_lengths and case.documents
    )
    one, other = (campaign_parts.vary(case, number) for number in (1, 2))
    assert one.query_lengths != other.query_lengths and one.documents != other.documents
    assert not np.array_equal(one.inputs()[0], other.inputs()[0])
    assert one.options == other.options == case.options


def test_a_run_goes_on(path):
    def stops(task, checks):
        if task == 1:
            raise KeyboardInterrupt
        yield checks, None

    with pytest.raises(KeyboardInterrupt):
        campaign.run([part_of(stops)], campaign.Results(path, HERE), budget_s=1e9)
    lines = []
    campaign.run([part_of(passes)], campaign.Results(path, HERE), 1e9, lines.append)
    assert [line.split(":")[0] for line in lines] == ["p 2/3", "p 3/3"]
    part = json.loads(path.read_text())["parts"]["p"]
    assert part["tasks"] == [0, 1, 2] and part["checks"] == 6 and part["failed"] == 0


def test_tasks_in_processes(path):
    """Spawned ones import the parts by name; what runs alone comes after them, here."""
    parts = [part_of(passes, "alone", goal=2, tasks=2), part_of(range_of, goal=40, tasks=20)]
    parts[0] = dataclasses.replace(parts[0], alone=True)
    lines = []
    campaign.run(parts, campaign.Results(path, HERE), 1e9, lines.append, processes=2)
    of_tasks = [line.split()[0] for line in lines if not line.startswith("FAILED")]
    assert of_tasks == ["p"] * 20 + ["alone"] * 2
    found = json.loads(path.read_text())["parts"]["p"]
    assert sorted(found["tasks"]) == list(range(20)) and found["checks"] == 40
    assert found["failed"] == 1 and found["failures"] == [
        dict(task=7, checks=2, text="task 7 of another")
    ]


def test_processes_end_in_time(path):
    """What was under way is finished and kept."""
    parts, lines = [part_of(range_of, goal=40, tasks=20)], []
    campaign.run(parts, campaign.Results(path, HERE), 0.01, lines.append, processes=2)
    assert len(lines) <= 3 and lines[-1] == "out of time: run again to go on"


def test_a_run_ends_in_time(path):
    lines = []
    campaign.run([part_of(passes)], campaign.Results(path, HERE), -1, lines.append)
    assert lines == ["out of time: run again to go on"] and not path.exists()


def test_failures_are_counted_and_some_are_kept(path):
    def fails(task, checks):
        yield from [(1, "wrong")] * 15
        raise ValueError("broken")

    results = campaign.Results(path, HERE)
    campaign.run([part_of(fails)], results, 1e9, log=lambda _: None)
    part = json.loads(path.read_text())["parts"]["p"]
    assert part["checks"] == part["failed"] == results.failed == 48
    assert len(part["failures"]) == campaign.MAX_FAILURES
    assert "ValueError: broken" in part["failures"][15]["text"]


def test_tasks_with_failures_run_again(path):
    def fails_at_1(task, checks):
        yield checks, "wrong" if task == 1 else None

    results = campaign.Results(path, HERE)
    campaign.run([part_of(fails_at_1)], results, 1e9, log=lambda _: None)
    results.drop_failures("p")
    assert results.part("p")["checks"] == 4 and results.failed == 0
    lines = []
    campaign.run([part_of(passes)], results, 1e9, lines.append)
    assert [line.split(":")[0] for line in lines] == ["p 2/3"]
    assert results.part("p")["checks"] == 6 and results.failed == 0

    many = [part_of(lambda task, checks: iter([(1, "wrong")] * 30))]
    campaign.run(many, campaign.Results(path, HERE, again=True), 1e9, log=lambda _: None)
    results = campaign.Results(path, HERE)
    results.drop_failures("p")
    assert results.part("p")["tasks"] == [] and results.part("p")["checks"] == 0


@pytest.mark.parametrize("change", [dict(source_hash="b" * 64), dict(gpu="another")])
def test_results_are_of_one_source_and_gpu(path, change):
    campaign.run([part_of(passes)], campaign.Results(path, HERE), 1e9, lambda _: None)
    with pytest.raises(SystemExit, match="--again"):
        campaign.Results(path, HERE | change)
    assert campaign.Results(path, HERE | change, again=True).data["parts"] == {}


def test_a_share_of_the_checks():
    assert part_of(passes, goal=300).scaled(0.1).checks_of_a_task == 10
    assert part_of(passes, goal=300).scaled(1e-9).checks_of_a_task == 1
    assert part_of(passes, goal=300).scaled(1).checks_of_a_task == 100


def test_the_page_shows_the_results():
    shown = campaign.render(campaign.saved(), PARTS)
    page = campaign.PAGE.read_text()
    assert campaign.rendered_page(page, shown) == page


def test_a_table_of_results(path):
    part = part_of(passes, goal=3000)
    campaign.run([part], campaign.Results(path, HERE), 1e9, lambda _: None)
    table = campaign.render(json.loads(path.read_text()), [part])
    assert "| p | 3,000 checks | 3,000 | 0 |" in table
    assert "today, a GPU, driver 1, jax 0, source aaaaaaaaaaaa." in table


def test_parts_that_do_not_exist(capsys):
    with pytest.raises(SystemExit):
        campaign.main(["forwards"])
    assert "no part forwards; expected some of forward" in capsys.readouterr().err

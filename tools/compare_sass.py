"""Compares the machine code of every kernel in two builds: what a refactor has to leave alone.

    python tools/compare_sass.py BEFORE AFTER [--may-change REGEX ...] [--rename OLD=NEW ...]

BEFORE and AFTER are modules (_C.abi3.so), object files or CMake build folders. A kernel is equal,
equal but for the offsets at which it reads its parameters (c[0x0][...]), or different; scheduling
(stalls, barriers, register reuse) counts. Kernels are paired by name and Config, whatever the
namespaces, file names and other template arguments around them. Fails when a kernel that no
--may-change names is different, or is in one build only.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from check_kernels import find_cuobjdump

# /*address*/ [@predicate] OPCODE operands ; /* low word of the encoding */
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
SECOND_WORD = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
PARAMETER = re.compile(r"c\[0x0\]\[([^\]]*)\]")
SCHEDULING_BITS = 41  # of the high word, from there on: stalls, barriers, register reuse
FIRST_PARAMETER = 0x210  # below it stand the launch's own constants

EQUAL, OFFSETS, DIFFERENT, ONLY_BEFORE, ONLY_AFTER = (
    "equal",
    "equal but for parameter offsets",
    "different",
    "only before",
    "only after",
)
BAD = (DIFFERENT, ONLY_BEFORE, ONLY_AFTER)


@dataclass
class Code:
    """A kernel's instructions: texts and encodings (the low word, then the high one)."""

    texts: list[str] = field(default_factory=list)
    words: list[int] = field(default_factory=list)


def read_sass(lines: Iterable[str]) -> dict[str, Code]:
    """Code by mangled name, from the output of cuobjdump -sass."""
    kernels: dict[str, Code] = {}
    code = Code()
    for line in lines:
        if match := re.search(r"Function : (\S+)", line):
            code = kernels.setdefault(match.group(1), Code())
        elif match := INSTRUCTION.match(line):
            code.texts.append(" ".join(match.group(1).split()))
            code.words.append(int(match.group(2), 16))
        elif match := SECOND_WORD.match(line):
            code.words.append(int(match.group(1), 16))
    return kernels


def without_offsets(text: str) -> str:
    """An instruction whose parameter offsets are all the same."""

    def hide(match: re.Match) -> str:
        register, _, offset = match.group(1).rpartition("+")
        if not offset.startswith("0x") or int(offset, 16) < FIRST_PARAMETER:
            return match.group(0)
        return f"c[0x0][{register}+parameter]"

    return PARAMETER.sub(hide, text)


def compare(before: Code, after: Code) -> str:
    if before == after:
        return EQUAL
    if len(before.words) != len(after.words):
        return DIFFERENT
    if [*map(without_offsets, before.texts)] != [*map(without_offsets, after.texts)]:
        return DIFFERENT
    scheduling = [[w >> SCHEDULING_BITS for w in code.words[1::2]] for code in (before, after)]
    return OFFSETS if scheduling[0] == scheduling[1] else DIFFERENT


def balanced(text: str, start: int) -> str:
    """From `start` up to the > that closes the first < from there on."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"<": 1, ">": -1}.get(text[i], 0)
        if text[i] == ">" and depth == 0:
            return text[start : i + 1]
    return text[start:]


def identity(demangled: str) -> str:
    """What a kernel keeps when code moves: its own name and its Config, or all its arguments."""
    name = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\b(?:\w+::)+", "", name)
    head = re.match(r"\w+", name).group(0)
    if config := re.search(r"\b\w*Config<", name):
        return f"{head}<{balanced(name, config.start())}>"
    return balanced(name, 0) if name.startswith(f"{head}<") else head


def demangle(names: list[str]) -> list[str]:
    ran = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return ran.stdout.splitlines()


def objects(build: Path) -> list[Path]:
    if build.is_file():
        return [build]
    found = sorted(build.glob("CMakeFiles/jax_fa3_kernels.dir/**/*.cu.o"))
    if not found:
        sys.exit(f"{build} has no compiled kernels")
    return found


def disassemble(path: Path) -> Iterator[str]:
    cuobjdump, search = find_cuobjdump()
    command = [cuobjdump, "-sass", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PATH": search}) as dump:
        yield from dump.stdout
    if dump.returncode != 0:
        sys.exit(f"{' '.join(command)} failed")


def load(build: Path, renames: list[tuple[str, str]] = ()) -> dict[str, Code]:
    """Code of a build's kernels by identity."""
    kernels: dict[str, Code] = {}
    for path in objects(build):
        found = read_sass(disassemble(path))
        for name, code in zip(demangle([*found]), found.values(), strict=True):
            for old, new in renames:
                name = re.sub(old, new, name)
            key = identity(name)
            if key in kernels:
                sys.exit(f"{build}: two kernels are {key}")
            kernels[key] = code
    return kernels


def first_difference(before: Code, after: Code) -> str:
    for i, (x, y) in enumerate(zip(before.texts, after.texts, strict=False)):
        if without_offsets(x) != without_offsets(y):
            return f"instruction {i}: {x} -> {y}"
    return f"{len(before.texts)} -> {len(after.texts)} instructions, or scheduling"


def judge(
    before: dict[str, Code], after: dict[str, Code], may_change: list[str], common: bool = False
) -> tuple[dict[str, str], list[str]]:
    """The outcome for each kernel, and what is wrong."""
    outcomes, problems = {}, []
    for name in sorted(before.keys() | after.keys()):
        if name in before and name in after:
            outcomes[name] = compare(before[name], after[name])
        elif common:
            continue
        else:
            outcomes[name] = ONLY_BEFORE if name in before else ONLY_AFTER
        if outcomes[name] in BAD and not any(re.search(x, name) for x in may_change):
            why = outcomes[name]
            if why == DIFFERENT:
                why += f", {first_difference(before[name], after[name])}"
            problems.append(f"{name}: {why}")
    return outcomes, problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--may-change", action="append", default=[], metavar="REGEX")
    parser.add_argument(
        "--rename", action="append", default=[], metavar="OLD=NEW", help="in BEFORE's names"
    )
    parser.add_argument("--common", action="store_true", help="only kernels that both builds have")
    args = parser.parse_args()
    renames = [tuple(x.split("=", 1)) for x in args.rename]
    before, after = load(args.before, renames), load(args.after)
    outcomes, problems = judge(before, after, args.may_change, args.common)
    for problem in problems:
        print(f"FAILED {problem}")
    counts = {x: list(outcomes.values()).count(x) for x in (EQUAL, OFFSETS, *BAD)}
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count))
    if not outcomes:
        print("no kernel to compare")
    return 1 if problems or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())

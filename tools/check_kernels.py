"""Gate on the compiled kernels: reads what ptxas printed and the SASS of every kernel in a build.

    python tools/check_kernels.py BUILD_FOLDER [--max-spill BYTES]

Fails on a WGMMA-serialisation or other C75xx warning (an ignored setmaxnreg is one), on spill
stores above the limit (a higher one where none of them stands among the kernel's products: a warp
that schedules may spill), on a main kernel without tensor-core (HGMMA, of 8 bits QGMMA) or TMA load
(UTMALDG) instructions, and when a generated unit lacks a kernel. Prints one row per kernel.
Kernels for functions, which are shipped to be linked, are linked with one that changes nothing and
held to the same; where NVRTC or nvJitLink is missing, the gate says so.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_SPILL = 64  # bytes of spill stores per kernel
MAX_SPILL_APART = 512  # where none stands between its first product and its last
BAD_WARNING = re.compile(r".*(?:\bC75\d\d\b|setmaxnreg.*ignored).*", re.IGNORECASE)
MAIN_KERNEL = re.compile(r"\d(forward|forward_cached|backward|dquery)_kernelI")
CONFIG = re.compile(
    r"\d(?:Forward|ForwardFloat8|ForwardCached|Backward)ConfigI(?:LNS_5DTypeE(\d)E)?((?:Li\d+E)+)"
    r"(?:Lb([01])E)?(?:LNS_7VariantE(\d)E)?"
)
VARIANTS = {
    "1": ", mask",
    "2": ", bias",
    "3": ", softcap",
    "4": ", alibi",
    "5": ", function",
    "6": ", blocks",
}
# A line of SASS: /*address*/ [@predicate] OPCODE operands
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
REQUIRED = ("GMMA", "UTMALDG")  # instructions of a main kernel
IDENTITY = """
struct JfaCaptured { const void* array[8]; };
struct JfaScore { float score, slope; };
#define JFA_PAIR int, int, int, int, const JfaCaptured&
extern "C" __device__ float jfa_score(float score, JFA_PAIR) { return score; }
extern "C" __device__ JfaScore jfa_score_and_slope(float score, JFA_PAIR) { return {score, 1.0f}; }
extern "C" __device__ bool jfa_mask(JFA_PAIR) { return true; }
extern "C" __device__ bool jfa_is_additive() { return true; }
extern "C" __device__ float jfa_addend(float, JFA_PAIR) { return 0.0f; }
"""


@dataclass
class Kernel:
    """One entry function, as ptxas and the disassembler report it."""

    mangled: str
    registers: int = 0
    spill_stores: int = 0  # bytes
    instructions: int = 0
    local_stores: int = 0  # instructions so far
    first_local_stores: int = 0  # before the first product
    last_local_stores: int = 0  # before the last product
    gmma: int = 0
    utmaldg: int = 0

    @property
    def is_main(self) -> bool:
        return MAIN_KERNEL.search(self.mangled) is not None

    @property
    def spills_among_products(self) -> bool:
        return self.gmma == 0 or self.last_local_stores > self.first_local_stores

    @property
    def name(self) -> str:
        base = re.search(r"\d([a-z_]+)I", self.mangled)
        name = base.group(1) if base else self.mangled
        config = CONFIG.search(self.mangled)
        if config is None:
            return name
        dtype = {"0": "bf16", "1": "fp16", None: "e4m3"}[config.group(1)]
        head_dim, head_dim_v, *tile = re.findall(r"\d+", config.group(2))
        if head_dim_v != head_dim:
            head_dim += f",{head_dim_v}"
        options = ", separate dQ" if config.group(3) == "1" else ""
        options += VARIANTS.get(config.group(4), "")
        return f"{name} {dtype} d{head_dim} {'x'.join(tile)}{options}"


def read_log(log: str) -> dict[str, Kernel]:
    """Kernels by mangled name, from the output of ptxas -v."""
    kernels: dict[str, Kernel] = {}
    current = Kernel("")
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            current = kernels.setdefault(match.group(1), Kernel(match.group(1)))
        elif match := re.search(r"Function properties for (\S+)", line):
            current = kernels.get(match.group(1), Kernel(""))
        elif match := re.search(r"(\d+) bytes spill stores", line):
            current.spill_stores = int(match.group(1))
        elif match := re.search(r"Used (\d+) registers", line):
            current.registers = int(match.group(1))
    return kernels


def find_cuobjdump() -> tuple[str, str]:
    """cuobjdump and the PATH it needs, from PATH or from the packages of this Python."""
    spec = importlib.util.find_spec("nvidia")
    folders = [f"{root}/cu13/bin" for root in (spec.submodule_search_locations if spec else [])]
    path = ":".join(["/usr/local/cuda/bin", *folders, "/usr/bin", "/bin"])
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=path)
    if found is None:
        sys.exit("no cuobjdump: install a CUDA toolkit or requirements/sass.txt")
    return found, f"{Path(found).parent}:{path}"


def read_sass(kernels: dict[str, Kernel], build_object: Path) -> None:
    """Counts instructions of each kernel, reading the disassembly as it comes."""
    cuobjdump, path = find_cuobjdump()
    command = [cuobjdump, "-sass", str(build_object)]
    current = Kernel("")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PATH": path}) as dump:
        for line in dump.stdout:
            if match := re.search(r"Function : (\S+)", line):
                current = kernels.get(match.group(1), Kernel(""))
            elif match := INSTRUCTION.match(line):
                current.instructions += 1
                if match.group(1).startswith(("HGMMA", "QGMMA")):
                    if current.gmma == 0:
                        current.first_local_stores = current.local_stores
                    current.last_local_stores = current.local_stores
                    current.gmma += 1
                current.local_stores += match.group(1).startswith("STL")
                current.utmaldg += match.group(1).startswith("UTMALDG")
    if dump.returncode != 0:
        sys.exit(f"{' '.join(command)} failed")


def check_unit(build: Path, log_path: Path, max_spill: int) -> tuple[list[Kernel], list[str]]:
    """Kernels of one translation unit and what is wrong with them."""
    log = log_path.read_text()
    unit = log_path.name.removesuffix(".cu.o.log")
    kernels = read_log(log)
    read_sass(kernels, log_path.with_suffix(""))
    problems = [f"{unit}: {match.group(0).strip()}" for match in BAD_WARNING.finditer(log)]
    mains = [kernel for kernel in kernels.values() if kernel.is_main]
    text = (build / "generated" / f"{unit}.cu").read_text()
    listed = len(re.findall(r"template Status (?!.*Variant::k(?:Function|Blocks)>)", text))
    launched = sum("dquery" not in kernel.mangled for kernel in mains)  # which brings its own
    if launched != listed:
        problems.append(f"{unit}: {launched} main kernels compiled, {listed} listed")
    for kernel in kernels.values():
        allowed = max_spill if kernel.spills_among_products else max(max_spill, MAX_SPILL_APART)
        if kernel.spill_stores > allowed:
            problems.append(
                f"{unit}: {kernel.name}: {kernel.spill_stores} bytes of spill stores, "
                f"at most {allowed} allowed"
            )
    return list(kernels.values()), problems + missing_instructions(unit, mains)


def missing_instructions(unit: str, mains: list[Kernel]) -> list[str]:
    problems = []
    for kernel in mains:
        counts = dict(zip(REQUIRED, (kernel.gmma, kernel.utmaldg), strict=True))
        problems += [
            f"{unit}: {kernel.name}: no {instruction} instruction"
            for instruction, count in counts.items()
            if count == 0
        ]
    return problems


def load_toolchain() -> Any:
    """jax_fa3/flex/toolchain.py, which needs neither the package nor JAX."""
    path = Path(__file__).parents[1] / "jax_fa3/flex/toolchain.py"
    spec = importlib.util.spec_from_file_location("toolchain", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check_linkable(fatbin: Path, libraries: Any, max_spill: int) -> tuple[list[Kernel], list[str]]:
    """The kernel of a fatbin, linked with a function that changes nothing."""
    code, log = libraries.link(fatbin.read_bytes(), libraries.compile(IDENTITY))
    kernels = read_log(log)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(code)
        cubin.flush()
        read_sass(kernels, Path(cubin.name))
    problems = [f"{fatbin.stem}: {match.group(0).strip()}" for match in BAD_WARNING.finditer(log)]
    mains = [kernel for kernel in kernels.values() if kernel.is_main]
    if len(mains) != 1:
        problems.append(f"{fatbin.stem}: {len(mains)} main kernels, expected 1")
    problems += [
        f"{fatbin.stem}: {kernel.spill_stores} bytes of spill stores, at most {max_spill} allowed"
        for kernel in mains
        if kernel.spill_stores > max_spill
    ]
    return mains, problems + missing_instructions(fatbin.stem, mains)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", type=Path, help="CMake build folder")
    parser.add_argument("--max-spill", type=int, default=MAX_SPILL, help="bytes (default 64)")
    args = parser.parse_args()
    logs = sorted(args.build.glob("CMakeFiles/jax_fa3_kernels.dir/**/*.cu.o.log"))
    units = {path.stem for path in (args.build / "generated").glob("*.cu")}
    logs = [log for log in logs if log.name.removesuffix(".cu.o.log") in units]
    if not logs or len(logs) != len(units):
        sys.exit(f"{len(logs)} of {len(units)} kernel units are compiled in {args.build}")

    sources = {path.stem for path in (args.build / "generated" / "linkable").glob("*.cu")}
    fatbins = sorted((args.build / "linkable").glob("*.fatbin"))
    if {path.stem for path in fatbins} != sources:
        sys.exit(f"{len(fatbins)} of {len(sources)} kernels for functions are in {args.build}")

    problems: list[str] = []
    print(f"{'kernel':<58} {'registers':>9} {'spill B':>7} {'SASS':>6} {'GMMA':>5} {'UTMALDG':>7}")
    checks = [functools.partial(check_unit, args.build, log, args.max_spill) for log in logs]
    libraries = load_toolchain().find()
    if isinstance(libraries, str):
        print(f"{len(fatbins)} kernels for functions are not linked: {libraries}")
    else:
        checks += [
            functools.partial(check_linkable, fatbin, libraries, args.max_spill)
            for fatbin in fatbins
        ]
    for check in checks:
        kernels, found = check()
        problems += found
        for k in kernels:
            print(
                f"{k.name:<58} {k.registers:>9} {k.spill_stores:>7} {k.instructions:>6} "
                f"{k.gmma:>5} {k.utmaldg:>7}"
            )
    for problem in problems:
        print(f"FAILED {problem}")
    print(f"{len(logs)} units, {len(fatbins)} kernels for functions, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

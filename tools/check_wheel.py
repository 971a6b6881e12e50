"""Gate on the built wheels, before they are released.

    python tools/check_wheel.py DIST [--kernels ALL | SOME | NONE] [--pythons PYTHON ...]

DIST holds a source distribution and a wheel for each of the tags below, all of one version. Of each
wheel the names, the size, the libraries and the symbols are read (nm and readelf of binutils). The
wheel is then installed into a fresh environment of a Python that the tag names, imported where no
GPU and no compiler can be found, and jax_fa3.doctor is run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TAGS = ("cp311-cp311", "cp312-abi3")
MAX_BYTES = 40 << 20
SYMBOLS = {"PyInit__C"}
LIBRARIES = {  # of the C library and the compiler, which every machine of a manylinux tag has
    "libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "libgcc_s.so.1",
    "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
}  # fmt: skip
NAME = re.compile(r"jax_fa3-(?P<version>[^-]+)-(?P<tag>[^-]+-[^-]+)-(?P<platform>[^-]+)\.whl")
MANYLINUX = re.compile(r"manylinux_(\d+)_(\d+)_")

USE = """
import json, sys
import jax_fa3
from jax_fa3 import _C
from jax_fa3.flex import link
compiled = _C.compiled_kernels()
shipped = {path.stem for path in link.FOLDER.glob("*.fatbin")}
of_functions = [x for x in compiled if x.get("variant") in ("function", "blocks")]
wanted = {name for x in of_functions for name in link.names(x).values()}
numbers = len(compiled), len(_C.listed_kernels())
json.dump([jax_fa3.__version__, *numbers, sorted(wanted ^ shipped)], sys.stdout)
"""


def output_of(*command: str | Path, **options) -> str:
    """What a command prints; its errors end the check."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def library_problems(path: Path, glibc: tuple[int, int]) -> list[str]:
    """What is wrong with an extension module that shall run on glibc (major, minor) and newer."""
    found = []
    defined = output_of("nm", "--dynamic", "--defined-only", path).splitlines()
    symbols = {line.split()[-1] for line in defined}
    if symbols != SYMBOLS:
        found.append(f"exports {sorted(symbols)}, expected {sorted(SYMBOLS)}")
    dynamic = output_of("readelf", "--dynamic", "--version-info", "--wide", path)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    if needed - LIBRARIES:
        found.append(f"needs {sorted(needed - LIBRARIES)}, expected the C library alone")
    if paths := re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.+)\]", dynamic):
        found.append(f"searches {paths} for libraries, expected no such path")
    versions = {tuple(map(int, x)) for x in re.findall(r"\bGLIBC_(\d+)\.(\d+)", dynamic)}
    newest = max(versions, default=(0, 0))
    if newest > glibc:
        numbers = ("{}.{}".format(*x) for x in (newest, glibc))
        found.append("needs glibc {}, the wheel's tag promises {}".format(*numbers))
    return found


def wheel_problems(wheel: Path) -> list[str]:
    """What is wrong with a wheel, as far as its name and its files tell."""
    name = NAME.fullmatch(wheel.name)
    if name is None:
        return ["the name is not that of a wheel of jax_fa3 for one platform"]
    found = []
    if wheel.stat().st_size > MAX_BYTES:
        found.append(f"{wheel.stat().st_size} bytes, at most {MAX_BYTES} allowed")
    platform = MANYLINUX.match(name["platform"])
    if platform is None:
        found.append(f"platform {name['platform']}, expected manylinux_X_Y (auditwheel repair)")
    glibc = tuple(map(int, platform.groups())) if platform else (0, 0)
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        libraries = [x for x in archive.namelist() if re.search(r"\.so(\.|$)", x)]
        if [re.sub(r"_C\..*so$", "_C", x) for x in libraries] != ["jax_fa3/_C"]:
            found.append(f"holds the libraries {libraries}, expected jax_fa3/_C alone")
        for library in libraries:
            path = Path(archive.extract(library, folder))
            found += [f"{library} {problem}" for problem in library_problems(path, glibc)]
        if "jax_fa3/py.typed" not in archive.namelist():
            found.append("has no jax_fa3/py.typed")
    return found


def set_problems(names: list[str]) -> list[str]:
    """What is missing from the names of the files of a release, or differs among them."""
    wheels = [match for name in names if (match := NAME.fullmatch(name))]
    sources = [x for name in names if (x := re.fullmatch(r"jax_fa3-([^-]+)\.tar\.gz", name))]
    found = []
    tags = sorted(x["tag"] for x in wheels)
    if tags != sorted(TAGS):
        found.append(f"wheels for {tags}, expected one for each of {sorted(TAGS)}")
    if len(sources) != 1:
        found.append(f"{len(sources)} source distributions, expected 1")
    versions = {x["version"] for x in wheels} | {x[1] for x in sources}
    if len(versions) > 1:
        found.append(f"versions {sorted(versions)}, expected one")
    return found


def kernel_problems(compiled: int, listed: int, wanted: str) -> list[str]:
    """`wanted` is ALL, SOME or NONE."""
    is_right = {"ALL": compiled == listed, "SOME": compiled > 0, "NONE": compiled == 0}[wanted]
    return [] if is_right else [f"{compiled} kernels of {listed}, expected {wanted}"]


def python_for(tag: str, pythons: list[str]) -> str | None:
    """The first of these Pythons that a wheel of the tag is for."""
    minor, abi = int(tag.split("-")[0].removeprefix("cp3")), tag.split("-")[1]
    for python in pythons:
        has = int(output_of(python, "-c", "import sys; print(sys.version_info.minor)"))
        if has == minor or (abi == "abi3" and has > minor):
            return python
    return None


def use_problems(wheel: Path, wanted: str, python: str) -> list[str]:
    """What is wrong with the wheel in a fresh environment without GPU and compiler."""
    name = NAME.fullmatch(wheel.name)
    with tempfile.TemporaryDirectory() as folder:
        output_of(python, "-m", "venv", folder)
        inside = Path(folder, "bin", "python")
        output_of(inside, "-m", "pip", "install", "-q", "--disable-pip-version-check",
                  wheel.resolve())  # fmt: skip
        alone = dict(cwd=folder, env={"PATH": f"{folder}/bin", "CUDA_VISIBLE_DEVICES": ""})
        version, compiled, listed, differ = json.loads(output_of(inside, "-c", USE, **alone))
        doctor = output_of(inside, "-m", "jax_fa3.doctor", **alone)
    found = kernel_problems(compiled, listed, wanted)
    if differ:
        found.append(f"kernels for functions that are missing, or that nothing asks for: {differ}")
    if version != name["version"]:
        found.append(f"jax_fa3.__version__ is {version}, the wheel's name says {name['version']}")
    if version not in doctor:
        found.append(f"jax_fa3.doctor does not name version {version}:\n{doctor}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dist", type=Path, help="folder of the source distribution and the wheels")
    parser.add_argument("--kernels", choices=("ALL", "SOME", "NONE"), default="ALL")
    parser.add_argument("--pythons", nargs="+", default=["python3.11", "python3.12"])
    args = parser.parse_args()
    files = sorted(path for path in args.dist.iterdir() if path.is_file())
    problems = set_problems([path.name for path in files])
    for wheel in (path for path in files if path.suffix == ".whl"):
        found = wheel_problems(wheel)
        if not found:
            python = python_for(NAME.fullmatch(wheel.name)["tag"], args.pythons)
            found += use_problems(wheel, args.kernels, python) if python else ["no Python for it"]
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
        problems += [f"{wheel.name}: {problem}" for problem in found]
    for problem in problems:
        print(f"FAILED {problem}")
    print(f"{len(files)} files, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""Imports and includes point down only, and what belongs to one file stays in it.

The layers are those of the architecture notes; a new file must be given a place here.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jax_fa3"
SRC = ROOT / "src"

# Each line may import from the lines below it. Of a package that is named as a whole, modules may
# import each other; others stand here one by one.
PYTHON_LAYERS = [
    ["__init__"],
    ["context_parallel.public", "flax", "keras", "doctor", "varlen", "cached.flash", "flex.public"],
    ["explanation", "export_checks"],
    ["api", "float8.public", "cached.public", "combine"],
    ["visibility.public", "cached.steps"],
    ["vjp", "cached.calls"],
    ["sharding"],
    ["context_parallel"],
    ["operations", "cached.operations"],
    ["cached.few_rows"],
    ["ffi", "xla", "reference", "cached.ffi", "cached.xla"],
    ["flex"],
    ["float8.rounding", "visibility.checks", "cached.arguments", "flex.block_mask", "flex.library"],
    ["mask", "route", "validate"],
    ["arguments", "native"],
    ["values"],
    ["visibility.table"],
    ["flex.translate"],
    ["flex.text"],
    ["flex.ranges"],
    ["score", "flex.operands"],
    ["operands", "cached.problem", "cached.rotary"],
    ["visibility.layout", "cached.layout"],
    ["flex.functions"],
    ["options", "custom_call", "result_type", "linear_map", "varying"],
    ["_C", "cached", "float8", "visibility"],
]
PYTHON_RANK = {name: -rank for rank, names in enumerate(PYTHON_LAYERS) for name in names}

# Each folder may include from those of a lower rank. A file that stands beside folders has a rank
# of its own: src/*.h and src/*.cc are above all of them, src/kernels/*.h below the families.
CPP_RANK = {
    "": 7,
    "kernels/forward_float8": 6,
    "kernels/backward": 6,
    "kernels/forward": 5,
    "kernels/backward_dq": 5,
    "kernels/backward_dbias": 5,
    "kernels/forward_cached": 6,
    "kernels/append": 5,
    "kernels/quantize": 5,
    "kernels/visibility": 5,
    "kernels/dense_mask": 5,
    "kernels": 4,
    "ffi": 3,
    "attention": 2,
    "device": 1,
    "call": 0,
}


def place_of(name):
    """The layer's name for a dotted one in jax_fa3: as much of it as PYTHON_LAYERS has."""
    found = [n for n in PYTHON_RANK if name == n or name.startswith(n + ".")]
    return max(found, key=len, default=name)


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return place_of(".".join(parts).removesuffix(".__init__"))


def python_files():
    return sorted(PACKAGE.rglob("*.py"))


def cpp_files():
    return sorted(p for p in SRC.rglob("*") if p.suffix in {".h", ".cc", ".cuh", ".cu"})


def imported_modules(text):
    """Dotted names that a Python text imports; `from a import b` gives a.b."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def our_imports(text):
    """The places of what a text imports of jax_fa3."""
    names = [name.removeprefix("jax_fa3.") for name in imported_modules(text)]
    ours = [name for name, full in zip(names, imported_modules(text), strict=True) if name != full]
    return {place_of(name) for name in ours}


def attributes(text):
    """Dotted attribute chains in a Python text, such as jax.ffi.ffi_call."""
    return {
        ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)
    }


def upward(module, imports, rank):
    """Imports that do not point down."""
    return sorted(name for name in imports if rank[name] >= rank[module] and name != module)


def includes(text):
    return re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', text, re.MULTILINE)


def folder_of(name):
    return name.rpartition("/")[0]


def upward_includes(folder, names):
    """Includes of our own folders that do not point down or stay in their folder."""
    folders = [(name, folder_of(name)) for name in names if (SRC / name).is_file()]
    return [
        name for name, other in folders if other != folder and CPP_RANK[other] >= CPP_RANK[folder]
    ]


def knows_xla(path):
    """Of a kernel family call.h and handler.cc do, and no other file."""
    folder = folder_of(str(path.relative_to(SRC)))
    return folder in {"", "ffi"} or path.name in {"call.h", "handler.cc"}


def test_every_module_has_a_layer():
    assert {module_of(path) for path in python_files()} <= set(PYTHON_RANK)
    assert {folder_of(str(path.relative_to(SRC))) for path in cpp_files()} == set(CPP_RANK)


@pytest.mark.parametrize("path", python_files(), ids=module_of)
def test_python_imports_point_down(path):
    assert not upward(module_of(path), our_imports(path.read_text()), PYTHON_RANK)


@pytest.mark.parametrize("path", python_files(), ids=module_of)
def test_python_uses_what_is_its_own(path):
    """Only public JAX; partitioning in sharding, the native module in native; jax.ffi in
    custom_call, and where ffi registers the handlers."""
    text, module = path.read_text(), module_of(path)
    used = attributes(text) | set(imported_modules(text))
    assert not [name for name in used if name.startswith(("jax._src", "jaxlib"))]
    for owner, words in {
        "custom_call": (r"jax\.ffi\.ffi_call",),
        "ffi": (r"jax\.ffi\.(?!ffi_call)",),
        "sharding": (r"custom_partitioning", r"\bshard_map\b", r"PartitionSpec"),
        "native": (r"jax_fa3\._C\b",),
    }.items():
        if module != owner:
            assert not [name for name in used for word in words if re.search(word, name)], owner


@pytest.mark.parametrize("path", cpp_files(), ids=lambda path: str(path.relative_to(SRC)))
def test_cpp_includes_point_down(path):
    folder = folder_of(str(path.relative_to(SRC)))
    names = includes(path.read_text())
    assert not upward_includes(folder, names)
    if not knows_xla(path):
        known = {"ffi/", "xla/", "nanobind/", "Python.h"}
        assert not [n for n in names if n.startswith(tuple(known)) or n.endswith("/call.h")]
    if folder == "call":
        assert not [n for n in names if n.startswith(("cute/", "cutlass/", "cuda"))]


@pytest.mark.parametrize("path", cpp_files(), ids=lambda path: str(path.relative_to(SRC)))
def test_cpp_device_code_stands_in_cuh(path):
    """A .h or .cc compiles with a host compiler: no kernels, no CuTe."""
    if path.suffix in {".h", ".cc"}:
        text = path.read_text()
        names = includes(text)
        assert "__global__" not in text and "<<<" not in text
        assert not [n for n in names if n.startswith(("cute/", "cutlass/")) or n.endswith(".cuh")]


@pytest.mark.parametrize("path", sorted((SRC / "device").glob("*")), ids=lambda path: path.name)
def test_device_layer_does_not_know_attention(path):
    assert not re.search(r"attention|softmax", path.read_text(), re.IGNORECASE)


def test_the_rules_themselves():
    """An upward edge is found."""
    assert upward("ffi", our_imports("from jax_fa3.api import x"), PYTHON_RANK) == ["api"]
    assert upward("ffi", our_imports("from jax_fa3 import sharding"), PYTHON_RANK) == ["sharding"]
    ring = our_imports("from jax_fa3.context_parallel.ring import forward")
    assert upward("operations", ring, PYTHON_RANK) == ["context_parallel"]
    public = our_imports("from jax_fa3.context_parallel.public import ring_attention")
    assert upward("context_parallel", public, PYTHON_RANK) == ["context_parallel.public"]
    assert not upward("api", our_imports("from jax_fa3 import vjp, options"), PYTHON_RANK)
    other = "kernels/backward/plan.h"
    assert upward_includes("kernels/forward", includes(f'#include "{other}"')) == [other]
    assert upward_includes("kernels", includes(f'#include "{other}"')) == [other]
    assert not upward_includes("kernels/backward", includes(f'#include "{other}"'))
    assert upward_includes("device", includes('#include "attention/mask.h"')) == [
        "attention/mask.h"
    ]
    assert not upward_includes("", includes('#include "kernels/forward/plan.h"\n#include <string>'))
    assert "jax.ffi.ffi_call" in attributes("jax.ffi.ffi_call(1)")

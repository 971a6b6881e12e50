"""The rows of a call's arrays are one table in both languages, read from the C++ text."""

import re
from pathlib import Path

from jax_fa3 import operands

SRC = Path(__file__).parents[1] / "src"


def operand_rows(text):
    """name: (dimensions, element, optional) of the rows in call/operands.h."""
    row = (
        r'constexpr Operand k\w+\{"(\w+)", (?:nullptr|"([A-Za-z0-9]+)"), '
        r"Element::k(\w+)(, /\*optional=\*/true)?\};"
    )
    rows = [(name, (dims, kind, bool(may))) for name, dims, kind, may in re.findall(row, text)]
    assert len(rows) == text.count("constexpr Operand k")
    return rows


def test_every_array_is_one_row():
    """One kind of element and one form for a name; a prepared value has other dimensions."""
    rows = operand_rows((SRC / "call/operands.h").read_text())
    assert len(set(rows)) == len(rows)
    twice = {name for name, _ in rows if [n for n, _ in rows].count(name) > 1}
    of_caches = {"key_cache", "value_cache", "query", "key", "value", "out", "lse", "query_offset"}
    assert twice == {"value_out", "visibility", "query_out"} | of_caches
    letters = set("".join(dims for _, (dims, *_) in rows))
    assert letters <= set("bsthkdemnpwvcxyfgqrijual1PSTMRLCXYGW")


def test_python_and_cpp_have_the_same_rows():
    """What a user passes and gets, by its public name. A dimension that may broadcast or is padded
    has a letter of its own in C++; a mask is the operand of the call that makes its table, and the
    kernels give the largest logit of each row."""
    cpp = dict(reversed(operand_rows((SRC / "call/operands.h").read_text())))  # the first of a name
    letters = {
        "visibility": ("bhv", "xyv"),
        "bias": ("bhst", "fgqr"),
        "dense_mask": ("bhu", "iju"),
        "sinks": ("bh", "ah"),
        "alibi_slopes": ("bh", "lh"),
        "max_logits": ("bh", "bhs"),
    }
    elements = {("float32",): "Float32", ("int32",): "Int32", ("bool",): "Bool"}
    compared, optional = 0, set()
    for bundle in (operands.Operands, operands.Outputs):
        for field, row in bundle.rows().items():
            name = row.argument or field
            default = "Output" if bundle is operands.Outputs else "Input"
            dims, in_cpp = letters.get(field, (row.dims, row.dims))
            assert row.dims == dims
            is_optional = cpp[name][2]
            assert cpp[name] == (in_cpp, elements.get(row.dtypes, default), is_optional), name
            optional.update([field] * is_optional)
            compared += 1
    assert compared >= 19
    always = {"query", "key", "value", "prepared_value", "mask", "out", "lse"}
    every = operands.Operands.rows().keys() | operands.Outputs.rows().keys()
    assert optional == every - always - {f"{name}_descale" for name in always}
    assert cpp["dsinks"] == ("bhs", "Float32", True)


def test_sources_of_a_table_have_the_same_rows():
    """Any of them may be missing."""
    rows = operand_rows((SRC / "call/operands.h").read_text())
    for name, row in operands.Sources.rows().items():
        assert (name, (row.dims, "Int32", True)) in rows
    table = operands.Operands.rows()["visibility"]
    assert ("visibility", (table.dims, "Int32", False)) in rows

"""The record of the public arguments, and the signatures and tables that must agree with it."""

import dataclasses
import inspect
import typing

import jax
import pytest

import jax_fa3
from jax_fa3 import api
from jax_fa3.arguments import Arguments
from jax_fa3.operands import Operands, Outputs
from jax_fa3.options import AttentionOptions

ARRAYS = {"bias", "mask"}
RECORD = {field.name: field.default for field in dataclasses.fields(Arguments)}
NOT_ASKED = {"implementation"}  # of is_supported
OF_WHOLE_SEQUENCES = {
    "bias",
    "mask",
    "sequence_parallel",
    "query_descale",
    "key_descale",
    "value_descale",
    "value_is_prepared",
}


def defaults(function):
    """{name: default} of a signature's parameters, in order."""
    return {
        name: dataclasses.MISSING if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
    }


def test_dot_product_attention_has_the_records_arguments():
    assert list(defaults(jax_fa3.dot_product_attention).items()) == list(RECORD.items())


def test_overloads_have_the_records_arguments():
    """Keywords are those of the record; what a form for divided sequences lacks stands apart."""
    keywords = set(typing.get_type_hints(api.WholeKeywords))
    assert keywords - set(typing.get_type_hints(api.Keywords)) == OF_WHOLE_SEQUENCES - ARRAYS
    for overload in typing.get_overloads(jax_fa3.dot_product_attention):
        *positional, _, _, last = names = list(defaults(overload))
        assert last == "keywords" and len(names) == 8
        assert positional == list(RECORD)[:5]
        assert keywords | set(names[:-1]) == set(RECORD)


def test_is_supported_has_the_records_arguments():
    want = {name: default for name, default in RECORD.items() if name not in NOT_ASKED}
    assert list(defaults(jax_fa3.is_supported).items()) == list(want.items())


@pytest.mark.parametrize("strategy", ["ring", "allgather", "ulysses"])
def test_divided_attention_has_the_records_arguments(strategy):
    got = defaults(getattr(jax_fa3, f"{strategy}_attention"))
    assert got.pop("axis_name") is dataclasses.MISSING and got.pop("layout") == "contiguous"
    want = {name: default for name, default in RECORD.items() if name not in OF_WHOLE_SEQUENCES}
    assert list(got.items()) == list(want.items())


def test_rows_name_arguments():
    """Every argument that is an array has a row, and every row an argument, or else an array that
    the package makes."""
    rows = Operands.rows()
    named = {row.argument or name for name, row in rows.items()} - {"prepared_value", "dense_mask"}
    assert named <= RECORD.keys()
    assert Outputs.rows().keys().isdisjoint(rows)
    options = {field.name for field in dataclasses.fields(AttentionOptions)}
    assert options & named == {"query_offset"}  # a number for all, or an array


def test_a_flag_that_is_not_known_to_the_type_checker_has_an_overload():
    overloads = typing.get_overloads(jax_fa3.dot_product_attention)
    flags = [inspect.signature(x).parameters["return_residual"].annotation for x in overloads]
    assert flags == ["Literal[False]", "Literal[True]", "bool"]


def test_programs_name_attention():
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), "float32")
    assert "fa3_attention" in jax.jit(jax_fa3.dot_product_attention).lower(x, x, x).as_text(
        debug_info=True
    )

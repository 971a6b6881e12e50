"""What README.md and pages for new users say: programs run, and names are right."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3
from jax_fa3 import export_checks

ROOT = pathlib.Path(__file__).parents[1]


def programs(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_readme_example_prints(capsys):
    (program,) = programs("README.md")
    exec(program, {})
    value, *lines = capsys.readouterr().out.splitlines()
    assert np.isfinite(float(value.split()[0]))
    assert len(lines) == 1 and "is_causal=True: runs " in lines[0]


def test_observe_explains(capsys):
    exec(programs("docs/observe.md")[0], {})
    assert ": runs " in capsys.readouterr().out


def test_observe_names_every_custom_call():
    page = (ROOT / "docs/observe.md").read_text()
    for target in export_checks.TARGETS:
        assert f"| `{target}` |" in page


def test_reference_has_every_public_name():
    page = (ROOT / "docs/reference.md").read_text()
    listed = set(re.findall(r"auto\w+:: (\w+)\n", page))
    assert listed == set(jax_fa3.__all__) - {"__version__"}


def test_decoding_with_plain_arrays():
    """Two steps of docs/coming_from.md see what the whole sequence sees."""
    names = dict(functools=functools, jax=jax, jnp=jnp, jax_fa3=jax_fa3)
    names |= dict(batch=2, capacity=8, kv_heads=2, head_dim=16)
    exec(programs("docs/coming_from.md")[-1], names)
    rng = np.random.default_rng()
    q, k, v = (jnp.asarray(rng.normal(size=(2, 2, n, 16)), jnp.bfloat16) for n in (4, 2, 2))
    caches = names["key_cache"], names["value_cache"]
    for i in range(2):
        rows = (x[:, i : i + 1] for x in (k, v))
        out, *caches = names["step"](q[:, i : i + 1], *caches, *rows, jnp.full(2, i, jnp.int32))
    want = jax_fa3.dot_product_attention(q, k, v, is_causal=True)[:, 1:]
    np.testing.assert_allclose(*(np.float32(x) for x in (out, want)), atol=0.05)

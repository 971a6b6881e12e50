"""flex_attention on the kernels, without a GPU: what is linked, kept and sent along."""

import base64
import functools
import hashlib
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa3
from jax_fa3 import create_block_mask, flex, flex_attention, native, route
from jax_fa3.flex import cache, link, toolchain
from jax_fa3.flex.block_mask import kernel_table

ROOT = Path(__file__).parents[1]
needs_linker = pytest.mark.skipif(link.why_not() is not None, reason=str(link.why_not()))
needs_module = pytest.mark.skipif(native.module() is None, reason=str(native.IMPORT_ERROR))

QUERY = jax.ShapeDtypeStruct((2, 300, 4, 64), jnp.bfloat16)
KEY = jax.ShapeDtypeStruct((2, 500, 2, 64), jnp.bfloat16)
SLOPES = jax.ShapeDtypeStruct((4,), jnp.float32)


def alibi(score, batch, head, row, key, slopes):
    return score - slopes[head] * abs(row - key)


def attend(query, key, slopes, **options):
    given = dict(captured=(slopes,)) | options
    return flex_attention(query, key, key, alibi, flex.causal_mask, **given)


def gradients(query, key, slopes, **options):
    def total(query, key):
        return attend(query, key, slopes, **options).astype(jnp.float32).sum()

    return jax.grad(total, (0, 1))(query, key)


def lowered(function, *x):
    """The text of a program for GPUs."""
    return jax.jit(function).trace(*x).lower(lowering_platforms=("cuda",)).as_text()


def linked_kernels(text):
    """[(target, attribute, key, code)] of the custom calls, without kernels that are not there."""
    found = []
    for target, config in re.findall(
        r"custom_call @(jax_fa3_flex_\w+)\(.*?mhlo.backend_config = (.*)", text
    ):
        kernels = re.findall(r'(\w*kernel) = \{code = "([^"]*)", key = "([^"]*)"\}', config)
        found += [(target, name, key, code) for name, code, key in kernels if key or code]
    return found


@pytest.fixture
def counted(monkeypatch):
    """Kernels are not linked, but named: a list of names that were to be linked."""
    names = []

    def linked(name, text):
        names.append(name)
        return link.LinkedKernel("0" * 64, base64.b64encode(name.encode()).decode())

    monkeypatch.setattr(link, "linked", linked)
    monkeypatch.setattr(link, "why_not", lambda: None)
    return names


@pytest.fixture
def on_hopper(monkeypatch, counted):
    """The kernels are there, until a program is compiled."""
    monkeypatch.setattr(route, "device_reason", lambda: None)
    return counted


# ---- The program


@needs_module
def test_kernels_of_a_program(counted):
    text = lowered(functools.partial(gradients), QUERY, KEY, SLOPES)
    targets = [target for target, *_ in linked_kernels(text)]
    assert targets == ["jax_fa3_flex_forward", "jax_fa3_flex_backward"]
    assert counted == [
        "forward_bf16_64_64_128_128_function",
        "backward_bf16_64_64_64_128_false_function",
    ]
    assert 'key value batch_number head_number captured_0"' in text


@needs_module
def test_deterministic_gradients_have_a_kernel_of_their_own(counted, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops")
    _, *backward = linked_kernels(lowered(functools.partial(gradients), QUERY, KEY, SLOPES))
    assert [name for _, name, *_ in backward] == ["dquery_kernel", "kernel"]
    assert counted[1:] == [
        "backward_bf16_64_64_64_128_true_function",
        "backward_dq_bf16_64_64_64_128_true_function",
    ]


@needs_module
def test_block_mask(counted):
    blocks = create_block_mask(flex.causal_mask, None, None, 300, 500)
    text = lowered(functools.partial(gradients, block_mask=blocks), QUERY, KEY, SLOPES)
    assert counted == [
        "forward_bf16_64_64_128_128_blocks",
        "backward_bf16_64_64_64_128_false_blocks",
    ]
    assert text.count(" block_states captured_0") == 2
    assert "tensor<1x1x5x3xi32>" in text  # groups of 64 rows, words of 256 keys and one more


@pytest.mark.parametrize("rows, keys", ((300, 500), (64, 16), (1, 4097), (1000, 256)))
@pytest.mark.parametrize("block", ((128, 128), (256, 384)))
def test_table_of_blocks(rows, keys, block):
    """A block's two bits for each of its groups of 64 rows and blocks of 16 keys."""
    shape = 2, 3, -(-rows // block[0]), -(-keys // block[1])
    states = np.random.default_rng(0).choice([0, 1, 3], shape).astype(np.uint8)
    table = np.asarray(kernel_table(jnp.asarray(states), block, rows, keys)).view(np.uint32)
    assert table.shape == (2, 3, -(-rows // 64), -(-keys // 256) + 1)
    for i in range(table.shape[2]):
        for j in range(-(-keys // 16)):
            got = table[:, :, i, j // 16] >> (2 * (j % 16)) & 3
            np.testing.assert_array_equal(got, states[:, :, 64 * i // block[0], 16 * j // block[1]])


@needs_linker
@needs_module
def test_machine_code_is_in_the_program(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    query, key = (jax.ShapeDtypeStruct((*x.shape[:3], 128), x.dtype) for x in (QUERY, KEY))
    traced = jax.jit(attend).trace(query, key, SLOPES)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    ((target, name, digest, code),) = linked_kernels(text)
    assert (target, name) == ("jax_fa3_flex_forward", "kernel")
    cubin = base64.b64decode(code, validate=True)
    assert hashlib.sha256(cubin).hexdigest() == digest
    assert cubin.startswith(b"\x7fELF") and b"forward_kernel" in cubin
    assert b"jfa_score" not in cubin  # it is inlined

    exported = jax.export.export(
        jax.jit(attend), platforms=["cuda"], disabled_checks=jax_fa3.export_checks.DISABLED_CHECKS
    )(query, key, SLOPES)
    again = jax.export.deserialize(exported.serialize())
    assert digest in again.mlir_module()


PROGRAM = """
import hashlib, jax, jax.numpy as jnp
from jax_fa3.flex import link
from jax_fa3.flex.functions import Functions, trace
from jax_fa3.operands import Extents
slopes = jnp.ones(4)
made, _ = trace("score_mod", lambda s, b, h, q, k, x: s - x[h] * jnp.abs(q - k), (slopes,), 1)
text = link.translation(Functions(made), [slopes], Extents(1, 9, 9, 4, 4, 128, 128)).text
print(link.linked("forward_bf16_128_128_128_128_function", text).key)
"""


@needs_linker
def test_equal_bits_in_every_process():
    environment = os.environ | {cache.VARIABLE: "", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    keys = {run([sys.executable, "-c", PROGRAM], env=environment).stdout for _ in range(2)}
    assert len(keys) == 1 and re.fullmatch(r"[0-9a-f]{64}\n", keys.pop())


# ---- The route


@needs_module
@pytest.mark.parametrize(
    "call, reason",
    (
        (
            lambda q, k: flex_attention(
                q, k, k, lambda s, b, h, i, j: s + jnp.sort(jnp.array([s, 1]))[0]
            ),
            r"score_mod: the primitive sort of .* at .*test_flex_kernels.py:\d+",
        ),
        (
            lambda q, k: flex_attention(
                q, k, k, None, lambda b, h, i, j, *x: sum(x)[h] < j, (SLOPES_OF_9,) * 9
            ),
            "the functions read 9 captured arrays; at most 8 are possible",
        ),
        (
            lambda q, k: flex_attention(
                q,
                k,
                k,
                None,
                flex.causal_mask,
                block_mask=create_block_mask(flex.causal_mask, None, None, 300, 500, block_size=64),
            ),
            r"multiples of 128 rows and keys, not \(64, 64\)",
        ),
        (
            lambda q, k: flex_attention(
                *(x.astype(jnp.float32) for x in (q, k, k)), lambda s, *_: s
            ),
            "the kernels take bfloat16 or float16, not float32",
        ),
        (
            lambda q, k: flex_attention(
                *(x.astype(jnp.float16) for x in (q, k, k)), lambda s, *_: s
            ),
            "the kernels take functions with bfloat16, not float16",
        ),
    ),
    ids=("primitive", "captured", "blocks", "dtype", "float16"),
)
def test_reasons(on_hopper, call, reason):
    query, key = jnp.zeros(QUERY.shape, QUERY.dtype), jnp.zeros(KEY.shape, KEY.dtype)
    (explained,) = jax_fa3.explain(call, query, key)
    assert re.search(reason, explained.reason)


SLOPES_OF_9 = jnp.ones(4)


@needs_module
def test_nothing_to_link_with(monkeypatch):
    monkeypatch.setattr(route, "device_reason", lambda: None)
    monkeypatch.setattr(toolchain, "find", lambda: "there is no libnvrtc.so.13")
    monkeypatch.setattr(link, "FOLDER", ROOT)
    (explained,) = jax_fa3.explain(attend, QUERY, KEY, SLOPES)
    assert explained.reason == f"this build has no kernels for functions in {ROOT}"
    monkeypatch.setattr(Path, "glob", lambda *_: iter([ROOT]))
    (explained,) = jax_fa3.explain(attend, QUERY, KEY, SLOPES)
    assert explained.reason == "there is no libnvrtc.so.13"
    assert "custom_call" not in lowered(attend, QUERY, KEY, SLOPES)


@needs_module
def test_gradient_of_a_captured_array(on_hopper):
    def total(slopes, query, key, implementation):
        out = attend(query, key, slopes, implementation=implementation)
        return out.astype(jnp.float32).sum()

    gradient = jax.grad(total, (0, 1))
    with pytest.raises(NotImplementedError, match=r"captured array 0, float32\[4\].* bias "):
        jax.eval_shape(functools.partial(gradient, implementation="fa3"), SLOPES, QUERY, KEY)
    text = lowered(functools.partial(gradient, implementation=None), SLOPES, QUERY, KEY)
    assert [target for target, *_ in linked_kernels(text)] == ["jax_fa3_flex_forward"]


@needs_module
def test_mapped_captured_arrays_run_through_xla(counted):
    mapped = jax.vmap(attend, (None, None, 0))
    slopes = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    assert not linked_kernels(lowered(mapped, QUERY, KEY, slopes))
    mapped = jax.vmap(attend, (0, None, None))
    query = jax.ShapeDtypeStruct((3, *QUERY.shape), QUERY.dtype)
    text = lowered(mapped, query, KEY, SLOPES)
    assert len(linked_kernels(text)) == 1 and "tensor<6x300x4x64xbf16>" in text


# ---- The libraries


@needs_linker
def test_errors_of_the_libraries():
    libraries = toolchain.find()
    with pytest.raises(
        RuntimeError, match=r"(?s)NVRTC cannot compile.*undefined.*int f\(\) \{ return x; \}"
    ):
        libraries.compile("__device__ int f() { return x; }")
    kernel = (link.FOLDER / "forward_bf16_128_128_128_128_function.fatbin").read_bytes()
    with pytest.raises(RuntimeError, match=r"(?s)nvJitLink cannot link.*jfa_score"):
        libraries.link(kernel, libraries.compile("__device__ int f() { return 1; }"))


def test_spills_are_told(caplog):
    log = "ptxas info : 600 bytes stack frame, 600 bytes spill stores, 700 bytes spill loads"
    link._tell_of_spills("a kernel", log)
    link._tell_of_spills("a kernel", log.replace("600", "60"))
    (said,) = caplog.messages
    assert "a kernel" in said and "600 bytes" in said


def test_versions_that_do_not_work_together():
    assert toolchain._why_not((13, 0), (13, 0)) is None
    assert toolchain._why_not((13, 0), (13, 5)) is None
    assert "NVRTC 13.5 is newer than nvJitLink 13.0" in toolchain._why_not((13, 5), (13, 0))
    assert "nvJitLink is of CUDA 14.0, expected 13" in toolchain._why_not((14, 0), (14, 0))


def test_doctor(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "new"))
    cache.store("x", bytes(3 << 20))
    jax_fa3.doctor()
    said = capsys.readouterr().out
    assert f"linked kernels are kept in {tmp_path}/new, 3.0 MiB" in said
    found = toolchain.find()
    reason = found if isinstance(found, str) else "NVRTC 13."
    assert reason in said or "no kernels for functions" in said


# ---- The cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "kept"
    monkeypatch.setenv(cache.VARIABLE, str(path))
    return path


def test_what_is_stored_is_loaded(folder):
    name = cache.key("a kernel", b"a function")
    assert cache.load(name) is None
    cache.store(name, b"code")
    assert cache.load(name) == b"code"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [x.name for x in folder.iterdir()] == [name + ".cubin"]  # nothing temporary is left
    assert cache.key("a", "bc") != cache.key("ab", "c")


def test_damaged_files_are_not_loaded(folder):
    cache.store("x", b"code")
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\0", whole[:-1] + b"E", whole[:7], b""):
        path.write_bytes(damaged)
        assert cache.load("x") is None
    cache.store("x", b"code")
    assert cache.load("x") == b"code"


def test_folders_that_others_may_write_to_are_not_used(folder, monkeypatch):
    cache.store("x", b"code")
    folder.chmod(0o770)
    assert cache.load("x") is None and "others may write" in cache.why_not(folder)
    folder.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert cache.load("x") is None and "belongs to another user" in cache.why_not(folder)


def test_no_folder(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.VARIABLE, "")
    cache.store("x", b"code")
    assert cache.load("x") is None and cache.size() == 0
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    cache.store("x", b"code")
    assert cache.load("x") is None


def test_bound(folder, monkeypatch):
    """What was used last stays."""
    monkeypatch.setattr(cache, "MOST_BYTES", 1000)
    for i in range(3):
        cache.store(str(i), bytes(300))
        os.utime(folder / f"{i}.cubin", (i, i))
    cache.load("0")
    cache.store("3", bytes(300))
    assert sorted(x.stem for x in folder.iterdir()) == ["0", "2", "3"]
    assert cache.size() <= 1000


STORES = """
import sys
from jax_fa3.flex import cache
for _ in range(200):
    cache.store("x", bytes([int(sys.argv[1])]) * 5000)
    assert cache.load("x") in (bytes([1]) * 5000, bytes([2]) * 5000)
"""


def test_two_processes(folder):
    """Each sees a whole file, its own or the other's."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", STORES, str(i)], env=environment) for i in (1, 2)
    ]
    assert [x.wait() for x in processes] == [0, 0]
    assert len(list(folder.iterdir())) == 1

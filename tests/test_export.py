"""jax.export of the call: artefacts for this machine, and for a GPU it does not have."""

import jax

from transforms import assert_near, attend, gradient, jitted, operands, score


def test_export_round_trip():
    x = operands()
    exported = jax.export.export(jax.jit(attend))(*x)
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    assert_near(again.call(*x), jitted(attend)(*x))

    def exported_loss(*x):
        return score(*again.call(*x))

    assert_near(jax.grad(exported_loss, argnums=(0, 1, 2))(*x), jitted(gradient)(*x))


def test_export_for_two_platforms_without_a_gpu():
    """One artefact for the CPU and for CUDA, with the kernels' calls inside."""
    x = operands()
    allowed = [
        jax.export.DisabledSafetyCheck.custom_call(f"jax_fa3_{direction}")
        for direction in ("forward", "forward_cached", "backward")
    ]
    exported = jax.export.export(
        jax.jit(gradient), platforms=("cpu", "cuda"), disabled_checks=allowed
    )(*x)
    text = exported.mlir_module()
    assert "@jax_fa3_forward" in text and "@jax_fa3_backward" in text
    again = jax.export.deserialize(exported.serialize())
    assert_near(again.call(*x), jitted(gradient)(*x))

"""Measurements of jax_fa3 beside what else a JAX user can pick; README.md says how they are made.

Run one from the repository's root: `python -m benchmarks.attention --help`, likewise `accuracy`,
`dispatch`, `ab` and `render`.
"""

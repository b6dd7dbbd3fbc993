"""Commands beside the runs: python -m drift_jax.tools.NAME.

A command's own module has its flags and `main`; what it does is in `work`,
which is imported when the flags are read.
"""

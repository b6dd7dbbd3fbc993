"""Commands beside the runs: python -m drift_jax.tools.NAME."""

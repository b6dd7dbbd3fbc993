"""Policies side by side: drift_jax.tools.table for runs of task 'policy' alone.

  python -m drift_jax.tools.policy_table --out=runs/table \\
      --from=runs/push-0,runs/push-1,runs/diffusion-0,runs/diffusion-1
"""

import functools

from absl import app, flags

from drift_jax import config as config_lib
from drift_jax.tools import table

if __name__ == "__main__":
  table.define_flags()
  flags.adopt_module_key_flags(table)
  app.run(
    functools.partial(table.main, task="policy"),
    flags_parser=config_lib.parse_flags,
  )

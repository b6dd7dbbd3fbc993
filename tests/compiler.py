"""What the tests ask of XLA, which ends a process at a flag it doesn't know."""

from typing import Any

import jaxlib.version

# Tests compile for longer than they compute: unoptimised code, by the emitters
# that are ready sooner.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
# As users compile. Sums of many terms are less exact otherwise.
USUAL: dict[str, Any] = {"xla_backend_optimization_level": 3}
if jaxlib.version.__version_info__ < (0, 11):
  QUICK["xla_cpu_use_fusion_emitters"] = False
  USUAL["xla_cpu_use_fusion_emitters"] = True


def flags(options: dict[str, Any]) -> str:
  """XLA_FLAGS of these options."""
  return " ".join(f"--{name}={value}" for name, value in options.items())

"""What a run says on the terminal: one line an event, and nothing else."""

import logging
import sys

from absl import logging as absl_logging
from tqdm import tqdm

logger = logging.getLogger("drift_jax")

# Orbax says this of every checkpoint that was saved without an evaluation.
_EXPECTED = "Requested `tracked_metric`; did not provide metrics."


class _Handler(logging.Handler):
  """Writes above a progress bar, if there is one, without breaking it."""

  def emit(self, record: logging.LogRecord) -> None:
    tqdm.write(self.format(record), file=sys.stderr)


def setup() -> None:
  """Sends this package's messages to stderr; other packages' only from
  warnings up. Called by entry points, never at import."""
  handler = _Handler()
  handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  logger.handlers[:] = [handler]
  logger.propagate = False
  logger.setLevel(logging.INFO)
  absl_logging.set_verbosity(absl_logging.WARNING)
  absl_logging.get_absl_logger().addFilter(
    lambda record: _EXPECTED not in record.getMessage()
  )

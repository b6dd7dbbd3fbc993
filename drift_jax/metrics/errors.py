"""What an evaluation can't go on with."""


class EvaluationError(ValueError):
  """Samples that can't be judged; the message says which and why."""

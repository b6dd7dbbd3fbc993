"""Checks of model arguments whose messages say what would be valid."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Shaped

DTYPES = ("float32", "bfloat16")


def reject_unknown(
  builder: Callable[..., object], unknown: Mapping[str, object]
) -> None:
  """Raises ValueError when arguments were given that the builder lacks.

  Args:
    builder: function whose keyword-only parameters are the valid names.
    unknown: the arguments it collected in its `**unknown`.

  Raises:
    ValueError: names each unknown argument, its closest valid name and all
      the valid ones.
  """
  if not unknown:
    return
  valid = [
    name
    for name, parameter in inspect.signature(builder).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
  ]
  complaints = []
  for name in unknown:
    close = difflib.get_close_matches(name, valid, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    complaints.append(f"{name!r}{hint}")
  raise ValueError(
    f"{getattr(builder, '__name__', builder)} does not know"
    f" {', '.join(complaints)}; valid arguments: {', '.join(valid)}"
  )


def require_int(name: str, value: int, minimum: int) -> None:
  """Raises ValueError unless value is an int of at least minimum."""
  if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
    raise ValueError(f"{name}={value!r}: must be an integer >= {minimum}")


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
  """Raises ValueError unless value is one of choices."""
  if value not in choices:
    raise ValueError(
      f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}"
    )


def require_multiple(
  name: str, value: int, divisor_name: str, divisor: int
) -> None:
  """Raises ValueError unless value is a multiple of divisor."""
  if value % divisor:
    raise ValueError(
      f"{name}={value} must be a multiple of {divisor_name}={divisor}, but"
      f" {value} % {divisor} = {value % divisor}"
    )


def require_colors(mean: Sequence[float], std: Sequence[float]) -> None:
  """Raises ValueError unless they are statistics of red, green and blue."""
  for name, values, minimum in (
    ("image_mean", mean, -math.inf),
    ("image_std", std, 0),
  ):
    if len(values) != 3 or not all(minimum < x < math.inf for x in values):
      raise ValueError(
        f"{name}={tuple(values)}: must be three finite numbers > {minimum}"
      )


def require_rgb(
  images: Shaped[ArrayLike, "..."], whose: str
) -> Shaped[Array, "B H W 3"]:
  """Returns images uint8 [B, H, W, 3]; ValueError for anything else."""
  images = jnp.asarray(images)
  if images.dtype != jnp.uint8:
    raise ValueError(
      f"{whose} images have dtype {images.dtype}, want uint8 in [0, 255]"
      " (metrics.to_uint8 makes them from [-1, 1], truncating as the published"
      " figures do)"
    )
  if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
    raise ValueError(
      f"{whose} images have shape {images.shape}, want non-empty [B, H, W, 3]"
    )
  return images

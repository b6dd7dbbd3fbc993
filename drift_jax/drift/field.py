"""The steps of Alg. 2: distances, affinities, coefficients, drift.

Every function works on the last two axes and accepts leading batch axes. The
targets of a sample are its positives (data, which attract) and its negatives
(generated samples and unconditional data, which repel).
"""

from collections.abc import Iterable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Normalization = Literal["xy", "y", "none"]
# Names of mapped axes.
Axes = str | tuple[str, ...]
# A temperature: one for all problems, or one for each.
Tau = float | Float[Array, ""] | Float[Array, "*B 1 1"]

# Up to this many channels a matmul has little to save on any accelerator, and
# subtraction is far more accurate for close pairs.
MAX_DIRECT_CHANNELS = 64

# A masked pair's distance, in units of the farthest target's and the
# temperature together: exponential kernels are exactly 0 there whatever the
# coordinates' unit, and unlike an infinity it survives a row or column that
# holds nothing else.
_MASKED_DISTANCE = 1e4

# Keeps the distance of coincident points, and its derivative, finite.
TINY_SQUARED_DISTANCE = 1e-30


def check_axes(remedy: str, **arrays: tuple[str, Any]) -> None:
  """Raises a ValueError for arrays of other axes than they must have.

  Args:
    remedy: what to do about another number of axes.
    **arrays: {name: (names of its axes, the array)}; axes of one name must have
      one size. '...' stands for any leading axes, which may differ.
  """
  sizes: dict[str, tuple[int, str]] = {}
  for name, (axes, array) in arrays.items():
    wanted, shape = axes.split(), tuple(array.shape)
    text = f"{name} has shape {shape}, want [{', '.join(wanted)}]"
    if wanted[0] == "...":
      wanted = wanted[1:]
      fits = len(shape) >= len(wanted)
    else:
      fits = len(shape) == len(wanted)
    if not fits:
      raise ValueError(f"{text}: {remedy}")
    for axis, size in zip(wanted, shape[-len(wanted) :], strict=True):
      other, owner = sizes.setdefault(axis, (size, name))
      if other != size:
        raise ValueError(
          f"{text} with {axis}={other} as {owner} has: they must agree"
        )


def wide_dtype(*arrays: Array) -> jnp.dtype:
  """The dtype of arithmetic with arrays: float32, or float64 if one has it."""
  is_double = any(array.dtype == jnp.float64 for array in arrays)
  wide = jnp.float64 if is_double else jnp.float32
  return jax.dtypes.canonicalize_dtype(wide)  # without x64 there is no float64


def weights_or_ones(
  name: str, weight: Array | None, shape: tuple[int, ...], dtype: jnp.dtype
) -> Float[Array, "..."]:
  """Weights in a dtype and without gradient; None stands for ones.

  Raises:
    ValueError: weights of another shape.
  """
  if weight is None:
    return jnp.ones(shape, dtype)
  if weight.shape != shape:
    raise ValueError(
      f"{name} has shape {weight.shape}; it must be {shape}, one weight per "
      "row of its features"
    )
  return jax.lax.stop_gradient(weight.astype(dtype))


def squared_distances(
  x: Float[Array, "*B N C"], y: Float[Array, "*B T C"]
) -> Float[Array, "*B N T"]:
  """||x_i - y_j||^2, never through an array of [B, N, T, C].

  Up to 64 channels by subtraction, which jit fuses into the reduction, and
  which is exact for coincident pairs. Beyond, by the gram expansion about the
  mean of x, with an absolute error of about 1e-7 (||x||^2 + ||y||^2) and
  negative values clipped to 0.

  Raises:
    ValueError: other axes than these.
  """
  check_axes("points are rows", x=("... N C", x), y=("... T C", y))
  if x.shape[-1] <= MAX_DIRECT_CHANNELS:
    difference = x[..., :, None, :] - y[..., None, :, :]
    return jnp.sum(difference**2, axis=-1)
  # Distances do not change, but an offset would cost the gram its digits; far
  # clusters keep theirs when one end of every pair is near the origin.
  center = jnp.mean(x, axis=-2, keepdims=True)
  x, y = x - center, y - center
  gram = jnp.matmul(x, y.mT, precision=jax.lax.Precision.HIGHEST)
  norm_x = jnp.sum(x**2, axis=-1)[..., :, None]
  norm_y = jnp.sum(y**2, axis=-1)[..., None, :]
  return jnp.maximum(norm_x + norm_y - 2.0 * gram, 0.0)


def mask_pairs(
  squared: Float[Array, "*B N T"],
  pairs: Bool[Array, "N T"],
  temperature: Tau,
) -> Float[Array, "*B N T"]:
  """Squared distances with some pairs beyond the reach of every kernel.

  Args:
    squared: ||x_i - y_j||^2, those of the pairs included.
    pairs: which take no part.
    temperature: tau > 0, in the units of the distances.
  """
  farthest = jnp.sqrt(jnp.max(squared, axis=(-2, -1), keepdims=True))
  # The mask has no gradient: it is only large.
  far = jax.lax.stop_gradient(_MASKED_DISTANCE * (farthest + temperature))
  return jnp.where(pairs, far**2, squared)


def affinities(
  squared_distance: Float[Array, "*B N T"],
  temperature: Tau,
  *,
  normalization: Normalization = "xy",
  affinity_floor: float = 0.0,
) -> Float[Array, "*B N T"]:
  """Normalised kernel A between N samples and their T targets (Alg. 2).

  With k(x, y) = exp(-||x - y|| / temperature) (eq. 12 of arXiv:2602.04770):
    "xy":   A = sqrt(softmax over targets * softmax over samples);
    "y":    A = softmax over targets;
    "none": A = k, no normalisation (Table 11).
  Then A = sqrt(max(A^2, affinity_floor)).

  Args:
    squared_distance: ||x - y||^2; targets are the positives and the negatives
      together, in any order.
    temperature: tau > 0, in the units of ||x - y||.
    normalization: "xy", "y" or "none".
    affinity_floor: lower bound of A^2, >= 0; 0 switches it off.

  Returns:
    A in [sqrt(affinity_floor), 1] (above 1 only if the floor is).

  Raises:
    ValueError: for a negative floor or an unknown normalization, or other axes
      than these.
  """
  check_affinities(affinity_floor, normalization)
  check_axes(
    "one row for each sample",
    squared_distance=("... N T", squared_distance),
  )
  squared = jnp.maximum(squared_distance, TINY_SQUARED_DISTANCE)
  if normalization == "xy":
    over_targets = _sqrt_softmax(squared, temperature, axis=-1)
    over_samples = _sqrt_softmax(squared, temperature, axis=-2)
    affinity = over_targets * over_samples
  elif normalization == "y":
    affinity = _sqrt_softmax(squared, temperature, axis=-1) ** 2
  else:
    affinity = jnp.exp(-jnp.sqrt(squared) / temperature)
  return jnp.maximum(affinity, affinity_floor**0.5)


def _sqrt_softmax(
  squared: Float[Array, "*B N T"],
  temperature: Tau,
  axis: int,
) -> Float[Array, "*B N T"]:
  """sqrt(softmax(-d / temperature)) of the distances d = sqrt(squared).

  A softmax's square root is the L2-normalised square root of its kernel. It
  depends on d - min(d) alone, and a small temperature magnifies the rounding
  of d; (d^2 - min(d)^2) / (d + min(d)) is the same without it.
  """
  nearest = jnp.min(squared, axis=axis, keepdims=True)
  excess = (squared - nearest) / (jnp.sqrt(squared) + jnp.sqrt(nearest))
  sqrt_kernel = jnp.exp(-excess / (2.0 * temperature))
  return sqrt_kernel / jnp.linalg.norm(sqrt_kernel, axis=axis, keepdims=True)


def product_coefficients(
  affinity_pos: Float[Array, "*B N P"],
  affinity_neg: Float[Array, "*B N M"],
) -> tuple[Float[Array, "*B N P"], Float[Array, "*B N M"]]:
  """Coefficients W of the product form (eq. 11, Alg. 2).

    W_pos = A_pos * sum over negatives of A_neg
    W_neg = A_neg * sum over positives of A_pos
  so that each row of [W_pos, -W_neg] sums to zero.

  Raises:
    ValueError: other axes than these.
  """
  check_axes(
    "one row for each sample",
    affinity_pos=("... N P", affinity_pos),
    affinity_neg=("... N M", affinity_neg),
  )
  w_pos = affinity_pos * affinity_neg.sum(axis=-1, keepdims=True)
  w_neg = affinity_neg * affinity_pos.sum(axis=-1, keepdims=True)
  return w_pos, w_neg


def mean_shift(
  x: Float[Array, "*B N C"],
  y: Float[Array, "*B T C"],
  w: Float[Array, "*B N T"],
) -> Float[Array, "*B N C"]:
  """Sum over targets of w_ij (y_j - x_i): invariant to translation (eq. 8).

  Rounding is relative to the coordinates: centre them first.

  Raises:
    ValueError: other axes than these.
  """
  check_axes(
    "points are rows",
    x=("... N C", x),
    y=("... T C", y),
    w=("... N T", w),
  )
  shift = jnp.matmul(w, y, precision=jax.lax.Precision.HIGHEST)
  return shift - w.sum(axis=-1, keepdims=True) * x


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
  """Raises a ValueError unless value is one of the choices."""
  if value not in choices:
    raise ValueError(
      f"{name}={value!r} is unknown; valid options: {', '.join(choices)}"
    )


def check_temperature(temperature: float) -> None:
  """Raises a ValueError unless temperature > 0."""
  if not temperature > 0:
    raise ValueError(f"temperature={temperature} must be positive")


def check_affinities(affinity_floor: float, normalization: str) -> None:
  """Raises a ValueError for what `affinities` can't take."""
  if not affinity_floor >= 0:
    raise ValueError(f"affinity_floor={affinity_floor} must be >= 0")
  check_choice("normalization", normalization, get_args(Normalization))


def batch_mean(values: Float[Array, "B ..."]) -> Float[Array, ""]:
  """Mean of everything; per row first, so that long sums stay accurate."""
  return jnp.mean(jnp.mean(values, axis=tuple(range(1, values.ndim))))


def over_axes(means: Any, axis_name: Axes) -> Any:
  """Means over all parts of B: one collective for the whole tree."""
  return jax.lax.pmean(means, axis_name) if axis_name else means

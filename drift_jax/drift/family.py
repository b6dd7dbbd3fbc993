"""The family of drifting fields, by name.

Every field is a function of a Problem, a temperature and its own options, and
gives Coefficients W: how strongly each sample x_i is pulled towards each
positive and pushed away from each negative,

  V+_i = sum_j W_pos[i, j] (y_pos_j - x_i),   V-_i likewise,   V = V+ - V-.

Features and drifts are normalised, guided, summed over temperatures and
regressed onto by the caller (`drift.loss`), the same for all. A field that is
not made of such differences gives Velocities, V+ and V- themselves.

To add one: write the function, and name it in FIELDS.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drift_jax.drift.field import (
  TINY_SQUARED_DISTANCE,
  Normalization,
  Tau,
  affinities,
  check_choice,
  mean_shift,
  product_coefficients,
)

KernelShape = Literal["laplace", "gaussian"]
Cost = Literal["l2", "quadratic"]


class Targets(NamedTuple):
  """Draws of one distribution, which acts on the samples by itself.

  Attributes:
    squared: squared distances from samples to members of the set.
    weight: weight of each member, >= 0; they need not sum to 1.
  """

  squared: Float[Array, "B N M"]
  weight: Float[Array, "B M"]


class Coefficients(NamedTuple):
  """Coefficients of a field; all >= 0.

  Attributes:
    pos: W of the positives.
    neg: W of the negatives: generated ones, then unconditional reals.
    floored: whether an affinity of the softmax field is at its floor; None for
      other fields.
  """

  pos: Float[Array, "B N P"]
  neg: Float[Array, "B N M"]
  floored: Array | None = None


class Velocities(NamedTuple):
  """V+ and V- of a field that has no coefficients."""

  pos: Float[Array, "B N C"]
  neg: Float[Array, "B N C"]


class Problem(NamedTuple):
  """B drift problems: samples x and their targets, without gradient.

  Targets are [generated, unconditional reals, positives]. Generated targets
  are the samples themselves or a batch of their own.

  Attributes:
    x: samples, normalised and centred.
    targets: in the same coordinates.
    squared: ||x_i - y_j||^2 > 0 in the units of the features. Masked pairs are
      so far apart that exponential kernels are 0, and others nearly.
    weight: weight of each target.
    unit: unit of distances: the mean distance S, or 1 if features are not
      normalised. A temperature tau of a config is tau * unit in these units.
    num_generated, num_negatives: counts of generated targets, of all negatives.
    apart: whether the unconditional reals are a set of their own (velocity
      guidance), or negatives as the generated ones are.
    with_self: whether generated target i is sample i.
  """

  x: Float[Array, "B N C"]
  targets: Float[Array, "B T C"]
  squared: Float[Array, "B N T"]
  weight: Float[Array, "B T"]
  unit: float | Float[Array, ""]
  num_generated: int
  num_negatives: int
  apart: bool
  with_self: bool

  def each(
    self, pull: Callable[[Targets], Float[Array, "B N _"]]
  ) -> Coefficients:
    """Coefficients of a field that looks at one set at a time.

    V = A(p) - A(q), where A follows from a set and the samples alone.

    Args:
      pull: function from a set to the coefficients of its members.
    """
    stops = [self.num_negatives, self.squared.shape[-1]]
    if self.apart and self.num_generated < self.num_negatives:
      stops.insert(0, self.num_generated)
    *negatives, positives = (
      pull(Targets(self.squared[..., start:stop], self.weight[:, start:stop]))
      for start, stop in itertools.pairwise([0, *stops])
    )
    return Coefficients(positives, jnp.concatenate(negatives, axis=-1))


Pulls = Coefficients | Velocities
Field = Callable[..., Pulls]


def displacement(
  problem: Problem,
  pulls: Pulls,
  attraction: float = 1.0,
  repulsion: float = 1.0,
) -> Float[Array, "B N C"]:
  """V = a V+ - b V- from the result of a field for a problem."""
  if isinstance(pulls, Velocities):
    return attraction * pulls.pos - repulsion * pulls.neg
  signed = jnp.concatenate(
    [-repulsion * pulls.neg, attraction * pulls.pos], axis=-1
  )
  return mean_shift(problem.x, problem.targets, signed)


def softmax(
  problem: Problem,
  temperature: Tau,
  *,
  normalization: Normalization = "xy",
  affinity_floor: float = 0.0,
) -> Coefficients:
  """The paper's field (eq. 11, Alg. 2, A.6 of arXiv:2602.04770).

    A = sqrt(softmax over targets * softmax over samples), A *= weights
    W_pos = A_pos * sum of A_neg,   W_neg = A_neg * sum of A_pos
  A sample's pull on a positive depends on the negatives and the other way
  round. V = 0 where q = p by anti-symmetry; the converse does not hold.

  Args:
    problem: samples and targets.
    temperature: tau of exp(-||x - y|| / tau).
    normalization: "xy" (above), "y" (softmax over targets), "none" (Table 11).
    affinity_floor: lower bound of A^2 before the weights.
  """
  affinity = affinities(
    problem.squared,
    temperature,
    normalization=normalization,
    affinity_floor=affinity_floor,
  )
  weighted = affinity * problem.weight[:, None, :]
  n_neg = problem.num_negatives
  w_pos, w_neg = product_coefficients(
    weighted[..., n_neg:], weighted[..., :n_neg]
  )
  return Coefficients(w_pos, w_neg, affinity <= affinity_floor**0.5)


def mmd(
  problem: Problem, temperature: Tau, *, kernel: KernelShape = "laplace"
) -> Coefficients:
  """Unnormalised kernels (C.2 of arXiv:2602.04770).

    V = E_p[k(x, y) (y - x)] - E_q[k(x, y) (y - x)]
  For the Gaussian kernel sigma^2 times the gradient flow of half the squared
  maximum mean discrepancy, eq. 43-45; V = 0 everywhere only if q = p. Far from
  all data it vanishes with k. Zero Sinkhorn iterations.

  Args:
    problem: samples and targets.
    temperature: tau of k = exp(-||x - y|| / tau), or sigma of the Gaussian
      exp(-||x - y||^2 / (2 sigma^2)).
    kernel: 'laplace' or 'gaussian'.
  """
  return problem.each(
    lambda y: transport(_exponent(y.squared, temperature, kernel), y.weight, 0)
  )


def kl(
  problem: Problem, temperature: Tau, *, kernel: KernelShape = "laplace"
) -> Coefficients:
  """Mean shifts, each normalised over its own set.

    V = E_p[k (y - x)] / E_p[k] - E_q[k (y - x)] / E_q[k]
  Half a Sinkhorn iteration. V = 0 where q = p. Arguments are those of `mmd`.
  """
  return problem.each(
    lambda y: transport(
      _exponent(y.squared, temperature, kernel), y.weight, 0.5
    )
  )


def gaussian(problem: Problem, temperature: Tau) -> Coefficients:
  """Difference of smoothed scores (arXiv:2603.09936).

    V = sigma^2 grad log(p_sigma / q_sigma),  p_sigma = p * N(0, sigma^2)
  `kl` with the Gaussian kernel of sigma = temperature: a conservative field,
  0 everywhere only if q = p. May be annealed, sigma(t) = sigma_0 exp(-r t), by
  the temperature's scale.
  """
  return kl(problem, temperature, kernel="gaussian")


def sharp(
  problem: Problem, temperature: Tau, *, kernel: KernelShape = "laplace"
) -> Coefficients:
  """Conservative for any kernel: normalised by k's potential k# (2604.06333).

    V = tau^2 (grad log(k# * p) - grad log(k# * q)),  grad_x k# = k (y - x)
    k#(r) = tau (r + tau) exp(-r / tau) of Laplace's kernel
  (for the Gaussian k# = sigma^2 k: the field `gaussian`). V = 0 everywhere
  only if q = p. The factor tau^2 makes V a displacement, as other fields'
  are. Arguments are those of `mmd`.
  """

  def pull(y: Targets) -> Float[Array, "B N _"]:
    exponent = _exponent(y.squared, temperature, kernel)
    nearest = jnp.min(exponent, axis=-1, keepdims=True)
    # At most 1: as in `transport`.
    k = jnp.exp(jnp.minimum(nearest - exponent, 0.0)) * y.weight[:, None, :]
    # k# / tau^2 over k: 1 + r / tau, where r / tau is Laplace's exponent.
    potential = k * (1.0 + exponent) if kernel == "laplace" else k
    return k / divisor(jnp.sum(potential, axis=-1, keepdims=True))

  return problem.each(pull)


def sinkhorn(
  problem: Problem,
  temperature: Tau,
  *,
  cost: Cost = "l2",
  iterations: int | float = 20,
) -> Coefficients:
  """Barycentric maps of entropic transport plans (2603.12366, 2605.11755).

    V = T_{q->p}(x) - T_{q->q'}(x),   T(x_i) = sum_j P_ij y_j / sum_j P_ij
  with P the plan of balanced transport from the samples to each set, both
  with the marginals of their weights, at the regularisation eps = R C for the
  quadratic cost ||x - y||^2 / 2 and R sqrt(C) for ||x - y||, of normalised
  features (R the temperature). q' wants to be an independent second batch, and
  no self mask. V = 0 everywhere only if q = p.

  Args:
    problem: samples and targets.
    temperature: R, in units of distance.
    cost: 'l2' or 'quadratic'.
    iterations: of the log-domain updates of both marginals. W-Flow takes 10 at
      R = .05 for B/2, and 1 for L/2 (R = .05) and XL/2 (.01), which leaves the
      targets' marginal inexact. 0 gives `mmd`, 0.5 `kl`.
  """

  def pull(y: Targets) -> Float[Array, "B N _"]:
    exponent = transport_exponent(y.squared, temperature, problem.unit, cost)
    return transport(exponent, y.weight, iterations)

  return problem.each(pull)


def transport_exponent(
  squared: Float[Array, "*B N M"], temperature: Tau, unit: Any, cost: Cost
) -> Float[Array, "*B N M"]:
  """c / eps of `sinkhorn`; arguments are as in a Problem."""
  if cost == "l2":
    return _exponent(squared, temperature, "laplace")
  return squared / (2.0 * temperature * unit)


def transport(
  exponent: Float[Array, "*B N M"],
  weight: Float[Array, "*B M"],
  iterations: int | float,
) -> Float[Array, "*B N M"]:
  """Rows of a transport plan, by Sinkhorn's iterations in the log domain.

    log u = log a - LSE_j(log v - c / eps)
    log v = log b - LSE_i(log u - c / eps)
    P = u_i v_j exp(-c_ij / eps),  a = 1 / N,  b = weight / sum of weights
  from log u = log a, log v = log b on. Rows are divided by their mass, but for
  0 iterations by a.

  Args:
    exponent: c / eps >= 0.
    weight: of the targets.
    iterations: 0; 0.5, the first update of u alone; or a number of updates of
      both.

  Returns:
    b_j exp(-c_ij / eps) after 0 iterations, else rows that sum to 1 (0 where
    no target has weight).
  """
  total = jnp.sum(weight, axis=-1, keepdims=True)
  log_b = jnp.log(weight / divisor(total))[..., None, :]
  return plan_rows(exponent, log_b, iterations)


def plan_rows(
  exponent: Float[Array, "*B N M"],
  log_b: Float[Array, "*B 1 M"],
  iterations: int | float,
) -> Float[Array, "*B N M"]:
  """`transport` to the marginal b; also inside of kernels."""
  log_a = -math.log(exponent.shape[-2])
  lse = functools.partial(jax.nn.logsumexp, keepdims=True)

  def update(_: Any, log_v: Float[Array, "*B 1 M"]) -> Float[Array, "*B 1 M"]:
    log_u = log_a - lse(log_v - exponent, axis=-1)
    # All weights 0: no mass to bring.
    log_u = jnp.where(jnp.isfinite(log_u), log_u, 0.0)
    return log_b - lse(log_u - exponent, axis=-2)

  log_v = jax.lax.fori_loop(0, int(iterations), update, log_b)
  logits = log_v - exponent
  if iterations == 0:
    return jnp.exp(logits)
  highest = jnp.max(logits, axis=-1, keepdims=True)
  lower = logits - jnp.where(jnp.isfinite(highest), highest, 0.0)
  # Compilers may round the highest of large logits otherwise than the rest.
  rows = jnp.exp(jnp.minimum(lower, 0.0))
  return rows / divisor(jnp.sum(rows, axis=-1, keepdims=True))


def _exponent(
  squared: Float[Array, "*B N M"], temperature: Tau, kernel: KernelShape
) -> Float[Array, "*B N M"]:
  """Exponent e of the kernel exp(-e)."""
  if kernel == "gaussian":
    return squared / (2.0 * temperature**2)
  return jnp.sqrt(jnp.maximum(squared, TINY_SQUARED_DISTANCE)) / temperature


def divisor(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
  """Safe divisor: zeros become 1, because the numerator is 0 there too."""
  return jnp.where(x > 0, x, 1.0)


FIELDS: dict[str, Field] = {
  "softmax": softmax,
  "mmd": mmd,
  "kl": kl,
  "gaussian": gaussian,
  "sharp": sharp,
  "sinkhorn": sinkhorn,
}
# Fields that look at all targets together: velocity guidance cannot split them.
JOINT_FIELDS = ("softmax",)


def defaults(name: str) -> dict[str, Any]:
  """A field's options, {name: default}."""
  parameters = inspect.signature(FIELDS[name]).parameters.values()
  return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}


def check_field(name: str, options: Mapping[str, Any]) -> None:
  """Raises a ValueError for an unknown field, option or value of one."""
  check_choice("field", name, FIELDS)
  parameters = inspect.signature(FIELDS[name]).parameters
  known = defaults(name)
  for option, value in options.items():
    if option not in known:
      raise ValueError(
        f"options.{option} is none of the field {name!r}; it has "
        f"{', '.join(known) or 'no options'}"
      )
    kind = parameters[option].annotation
    if get_origin(kind) is Literal:
      check_choice(f"options.{option}", value, get_args(kind))
  iterations = options.get("iterations", 0)
  if name == "sinkhorn" and not (
    iterations == 0.5 or (iterations >= 0 and iterations == int(iterations))
  ):
    raise ValueError(
      f"options.iterations={iterations} of the field 'sinkhorn': want 0, 0.5 "
      "or a whole number of iterations"
    )

"""The family of fields against float64 oracles, POT, and its own symmetries."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest

from drift_jax import config as config_lib
from drift_jax import drift
from drift_jax.drift import Variant, compute_field, drift_loss, family
from tests.conftest import assert_close
from tests.drift.field_test import oracle_affinities

FIELDS = [
  ("softmax", {}),
  ("mmd", {}),
  ("mmd", {"kernel": "gaussian"}),
  ("kl", {}),
  ("gaussian", {}),
  ("sharp", {}),
  ("sharp", {"kernel": "gaussian"}),
  ("sinkhorn", {"iterations": 7}),
  ("sinkhorn", {"iterations": 7, "cost": "quadratic"}),
]
NAMES = ["-".join([n, *map(str, o.values())]) for n, o in FIELDS]
all_fields = pytest.mark.parametrize(("field", "options"), FIELDS, ids=NAMES)
jitted_field = jax.jit(
  compute_field,
  static_argnames=(
    "temperature",
    "field",
    "mask_self",
    "kernel",
    "cost",
    "iterations",
    "normalization",
  ),
)


# No points.
NONE = np.zeros((0, 3))


def exponents(distance, temperature, unit, field, options):
  if options.get("cost") == "quadratic":
    return distance**2 / (2 * temperature * unit**2)
  if field == "gaussian" or options.get("kernel") == "gaussian":
    return distance**2 / (2 * (temperature * unit) ** 2)
  return distance / (temperature * unit)


def plan(exponent, weight, iterations):
  """Sinkhorn's plan in float64 as the textbook has it: u K v."""
  k = np.exp(-exponent)
  a = np.full(len(k), 1 / len(k))
  b = weight / weight.sum()
  u, v = a, b
  for _ in range(int(iterations)):
    u = a / (k @ v)
    v = b / (u @ k)
  return u[:, None] * k * v


def one_sided(distance, weight, temperature, unit, field, options):
  """Coefficients of a set [M], in float64."""
  e = exponents(distance, temperature, unit, field, options)
  b = weight / weight.sum()
  if field == "sinkhorn":
    p = plan(e, weight, options["iterations"])
    return p / p.sum(-1, keepdims=True)
  k = np.exp(-e) * b
  if field == "mmd":
    return k
  potential = k
  if field == "sharp" and options.get("kernel") != "gaussian":
    tau = temperature * unit
    potential = k * tau * (distance + tau) / tau**2
  return k / potential.sum(-1, keepdims=True)


def oracle(
  x,
  pos,
  gen,
  unc=NONE,
  *,
  field,
  options=(),
  temperature,
  unit=1.0,
  alpha=1.0,
  velocity=False,
  masked=True,
):
  """V of one problem, by explicit differences.

  alpha - 1 weighs the unconditional reals: as a velocity, or all together as
  (alpha - 1) (N - 1) negatives. masked: gen is x, and self-pairs are left out.
  """
  options = dict(options)
  x, pos, gen, unc = map(np.float64, (x, pos, gen, unc))

  def differences(y):
    return y[None] - x[:, None]

  def lengths(y, is_self=False):
    d = np.sqrt((differences(y) ** 2).sum(-1))
    if is_self:
      np.fill_diagonal(d, 1e4 * (d.max() + temperature * unit))
    return d

  n, m = len(gen), len(unc)
  each = (alpha - 1) * (n - 1) / max(m, 1)
  weight = np.concatenate([np.ones(n), np.full(m, each)])
  if field == "softmax":
    d = np.concatenate([lengths(gen, masked), lengths(unc), lengths(pos)], 1)
    a = oracle_affinities(d[None] / unit, temperature, "xy")[0]
    a[:, : n + m] *= weight
    w_neg = a[:, : n + m] * a[:, n + m :].sum(1, keepdims=True)
    w_pos = a[:, n + m :] * a[:, : n + m].sum(1, keepdims=True)
    y_neg = np.concatenate([gen, unc])
    return np.einsum("nm,nmd->nd", w_pos, differences(pos)) - np.einsum(
      "nm,nmd->nd", w_neg, differences(y_neg)
    )

  def pull(y, weight, is_self=False):
    w = one_sided(
      lengths(y, is_self), weight, temperature, unit, field, options
    )
    return np.einsum("nm,nmd->nd", w, differences(y))

  if velocity:
    to_data = pull(pos, np.ones(len(pos)))
    return (
      alpha * to_data
      - pull(gen, np.ones(n), masked)
      - (alpha - 1) * pull(unc, np.ones(m))
    )
  both = np.concatenate([gen, unc])
  d_neg = np.concatenate([lengths(gen, masked), lengths(unc)], 1)
  w = one_sided(d_neg, weight, temperature, unit, field, options)
  return pull(pos, np.ones(len(pos))) - np.einsum(
    "nm,nmd->nd", w, differences(both)
  )


def arrays(seed=0, n=6, p=9, m=5, c=3):
  rng = np.random.default_rng(seed)
  x, gen = rng.normal(size=(2, n, c))
  pos = rng.normal(size=(p, c)) + 0.5
  unc = rng.normal(size=(m, c)) - 0.5
  return tuple(jnp.asarray(a, jnp.float32) for a in (x, pos, gen, unc))


# The product form is no difference of one-sided fields: it has no velocities.
GUIDED = [
  (field, options, guidance)
  for field, options in FIELDS
  for guidance in ("negatives", "velocity")
  if (field, guidance) != ("softmax", "velocity")
]


def by_loss(x, pos, unc=None, **options):
  """(V from the gradient of drift_loss in x, loss, info)."""
  arrays = {k: v for k, v in options.items() if isinstance(v, jax.Array)}
  static = {k: v for k, v in options.items() if k not in arrays}

  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss_of(x, pos, unc, arrays):
    loss, info = drift_loss(
      x[None], pos[None], unc[None], affinity_floor=0.0, **arrays, **static
    )
    return loss[0], info

  unc = jnp.zeros((0, x.shape[1])) if unc is None else unc
  (loss, info), gradient = jax.jit(loss_of)(x, pos, unc, arrays)
  return -gradient * x.size / 2, loss, info


@pytest.mark.parametrize(("field", "options", "guidance"), GUIDED)
@pytest.mark.parametrize(
  ("negatives", "extra"),
  [("own", 0), ("own_with_self", 0), ("independent", 0), ("own", 4)],
)
def test_float64_oracle(field, options, negatives, extra, guidance):
  """V on raw features, of a single temperature; extra negatives are more."""
  x, pos, gen, unc = arrays()
  alpha, velocity = 1.7, guidance == "velocity"
  independent = gen[:extra] if negatives == "own" else gen
  repelling = gen
  if negatives != "independent":
    repelling = jnp.concatenate([x, gen[:extra]])
  total = (alpha - 1) * (1 if velocity else len(repelling) - 1)
  v, loss, _ = by_loss(
    x,
    pos,
    unc,
    weight_neg=jnp.full((1, len(unc)), total / len(unc)),
    temperatures=(0.8,),
    variant=Variant(
      field=field,
      options=options,
      negatives=negatives,
      guidance=guidance,
      normalize_features=False,
      normalize_drift=False,
    ),
    independent=independent[None]
    if negatives == "independent" or extra
    else None,
  )
  expected = oracle(
    *(x, pos, repelling, unc),
    field=field,
    options=options,
    temperature=0.8,
    alpha=alpha,
    velocity=velocity,
    masked=negatives == "own",
  )
  assert_close(v, expected, 3e-6)
  assert_close(loss, (expected**2).mean(), 6e-6)


@all_fields
def test_normalised_as_the_paper_does(field, options):
  """Scale, units and RMS; the quadratic cost's scale is a root mean square."""
  x, pos, gen, unc = arrays(seed=1)
  temperatures, strength = (0.2, 0.6), 0.7
  velocity = field != "softmax"
  v, _, info = by_loss(
    x,
    pos,
    unc,
    weight_neg=jnp.full((1, 5), strength / 5),
    temperatures=temperatures,
    variant=Variant(
      field=field,
      options=options,
      negatives="independent",
      guidance="velocity" if velocity else "negatives",
    ),
    independent=gen[None],
  )
  n, c = x.shape
  parts = [gen, pos] if velocity else [gen, unc, pos]
  targets = np.float64(np.concatenate(parts))
  distance = np.linalg.norm(targets[None] - np.float64(x)[:, None], axis=-1)
  w = np.ones(len(targets))
  if not velocity:
    w[len(gen) : -len(pos)] = strength / 5
  power = 2 if options.get("cost") == "quadratic" else 1
  scale = ((distance**power * w).mean() / w.mean()) ** (1 / power)
  assert_close(info["scale"], scale, 1e-6)
  total, unit = 0.0, scale / math.sqrt(c)
  for temperature in temperatures:
    expected = oracle(
      *(x, pos, gen, unc),
      field=field,
      options=options,
      temperature=temperature,
      unit=scale,
      alpha=1 + strength / (1 if velocity else n - 1),
      velocity=velocity,
      masked=False,
    )
    mean_square = ((expected / unit) ** 2).mean()
    assert_close(info["drift_ms"][temperature], mean_square, 1e-5)
    total += expected / unit / np.sqrt(mean_square)
  assert_close(v * unit, total, 5e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@all_fields
def test_self_pairs_are_left_out_in_any_unit(field, options, scale):
  """Of compute_field and of the loss on raw distances."""
  x, pos, _, _ = (array * scale for array in arrays())
  # The same temperature of larger points.
  power = 2 if options.get("cost") == "quadratic" else 1
  temperature = 0.8 * scale**power
  expected = oracle(
    x, pos, x, field=field, options=options, temperature=temperature
  )
  v = compute_field(
    x, pos, x, temperature, field=field, mask_self=True, **options
  )
  assert_close(v, expected, 3e-6)
  # Normalised drifts are those of any unit, too.
  normalize_drift = scale < 1
  variant = Variant(
    field=field,
    options=options,
    normalize_features=False,
    normalize_drift=normalize_drift,
  )
  v, *_ = by_loss(x, pos, temperatures=(temperature,), variant=variant)
  rms = np.sqrt((expected**2).mean()) if normalize_drift else 1.0
  assert_close(v, expected / rms, 4e-6)


@pytest.mark.parametrize(
  ("temperature", "neighbours", "stretch"), [(2.0, 0.0, 99.0), (1.0, 8.9, None)]
)
@pytest.mark.parametrize("scale", [None, 1e-3, 1e3])
@pytest.mark.parametrize("field", ["softmax", "kl", "sinkhorn"])
def test_self_pairs_are_left_out_at_any_temperature(
  field, scale, temperature, neighbours, stretch
):
  """However far 'learned' or 'adaptive' stretches it; None: normalised."""
  raw, scale = scale is not None, scale or 1.0
  x, pos, *_ = (array * scale for array in arrays())
  if not neighbours:
    temperature, stretch = temperature * scale, jnp.asarray(stretch)
  variant = Variant(
    field=field, normalize_features=not raw, neighbours=neighbours
  )
  v, _, info = by_loss(
    x,
    pos,
    temperatures=(temperature,),
    variant=variant,
    temperature_scale=stretch,
  )
  if neighbours:
    stretch = info["extra"]["temperature_scale"][temperature]
    number = info["effective_positives"][temperature]
    assert_close(number, neighbours, 1e-3)
  unit = 1.0 if raw else float(info["scale"])
  expected = oracle(
    *(x, pos, x),
    field=field,
    options={"iterations": 20},
    temperature=temperature * float(stretch),
    unit=unit,
  )
  v *= 1.0 if raw else unit / math.sqrt(3)
  assert_close(v, expected / np.sqrt((expected**2).mean()), 2e-4)


def test_sinkhorn_is_pots():
  """The plan of many iterations is that of an independent solver."""
  x, pos, *_ = arrays(n=16, p=16)
  cost = np.float64(np.linalg.norm(x[:, None] - pos[None], axis=-1))
  weight = np.random.default_rng(2).uniform(0.2, 2.0, 16)
  eps = 0.3
  expected = ot.sinkhorn(
    np.full(16, 1 / 16),
    weight / weight.sum(),
    cost,
    eps,
    method="sinkhorn_log",
    stopThr=1e-14,
    numItermax=5000,
  )
  rows = family.transport(
    jnp.asarray(cost / eps, jnp.float32),
    jnp.asarray(weight, jnp.float32),
    1000,
  )
  assert_close(rows / 16, expected, 2e-6)
  # Few iterations leave an error in the columns' sums; the rows' are exact.
  few = family.transport(
    jnp.asarray(cost / eps, jnp.float32), jnp.asarray(weight, jnp.float32), 2
  )
  assert_close(few.sum(-1), np.ones(16), 1e-6)
  error = np.abs(few.sum(0) / 16 - weight / weight.sum()).sum()
  assert 1e-3 < error < 0.3


@pytest.mark.parametrize(
  ("field", "is_regression"),
  [("softmax", False), ("mmd", False), ("kl", True), ("sinkhorn", True)],
)
def test_one_positive_of_a_condition(field, is_regression):
  """Whether V, in the mean over positives, knows but their mean.

  It does where each set is normalised alone: the pull of a single positive is
  y - x, at any distance and temperature.
  """
  x, positives, *_ = arrays(n=5, p=4)

  def v(y):
    return jitted_field(x, y[None], x, 0.7, field=field, mask_self=True)

  of_mean = v(np.mean(positives, axis=0, dtype=np.float32))
  mean = np.mean([v(y) for y in positives], axis=0)
  error = np.linalg.norm(mean - of_mean) / np.linalg.norm(of_mean)
  assert error < 1e-5 if is_regression else error > 0.1


@pytest.mark.parametrize("kernel", ["laplace", "gaussian"])
def test_one_code_path_for_three_energies(kernel):
  """No iteration is mmd, half of one kl; from few to many in between."""
  x, pos, gen, _ = arrays()
  field = functools.partial(jitted_field, x, pos, gen)
  if kernel == "laplace":
    sinkhorn = functools.partial(field, 0.6, field="sinkhorn")
  else:  # eps = sigma^2 on raw distances
    sinkhorn = functools.partial(
      field, 0.6**2, field="sinkhorn", cost="quadratic"
    )
  mmd = field(0.6, field="mmd", kernel=kernel)
  kl = field(0.6, field="kl", kernel=kernel)
  assert_close(sinkhorn(iterations=0), mmd, 1e-6)
  assert_close(sinkhorn(iterations=0.5), kl, 1e-6)
  assert np.abs(sinkhorn(iterations=1) - kl).max() > 0.01


def test_gaussian_is_a_difference_of_smoothed_scores():
  """V = sigma^2 grad log(p_sigma / q_sigma), by differentiating densities."""
  x, pos, gen, _ = arrays()
  sigma = 0.7

  def log_density(x, data):
    return jax.nn.logsumexp(-jnp.sum((x - data) ** 2, -1) / (2 * sigma**2))

  def potential(x):
    return sigma**2 * (log_density(x, pos) - log_density(x, gen))

  expected = jax.vmap(jax.grad(potential))(jnp.asarray(x))
  assert_close(
    jitted_field(x, pos, gen, sigma, field="gaussian"), expected, 2e-6
  )
  both = jitted_field(x, pos, gen, sigma, field="sharp", kernel="gaussian")
  assert_close(both, expected, 2e-6)


def test_sharp_is_conservative_and_kl_is_not():
  """The Jacobian of a gradient is symmetric; sharp's potential is known."""
  x, pos, gen, _ = arrays()
  tau = 0.7

  def v(point, field):
    return jitted_field(point[None], pos, gen, tau, field=field)[0]

  def potential(point):
    def log_smoothed(data):
      r = jnp.sqrt(jnp.sum((point - data) ** 2, -1))
      return jnp.log(jnp.mean(tau * (r + tau) * jnp.exp(-r / tau)))

    return tau**2 * (log_smoothed(pos) - log_smoothed(gen))

  assert_close(
    jitted_field(x, pos, gen, tau, field="sharp"),
    jax.vmap(jax.grad(potential))(jnp.asarray(x)),
    2e-6,
  )

  def rotation(field):
    """By central differences: fields are without gradient."""
    step = 1e-2
    rows = [
      (v(x[0] + step * e, field) - v(x[0] - step * e, field)) / (2 * step)
      for e in np.eye(3, dtype=np.float32)
    ]
    jacobian = np.stack(rows)
    return np.abs(jacobian - jacobian.T).max() / np.abs(jacobian).max()

  assert rotation("sharp") < 2e-3
  assert rotation("kl") > 5e-3


@all_fields
def test_equilibrium(field, options):
  """V = 0 where q = p, and V_{p,q} = -V_{q,p} (3.2)."""
  x, pos, gen, _ = arrays(p=8)
  gen = jnp.concatenate([gen, x])[:8]
  call = functools.partial(
    jitted_field, temperature=0.5, field=field, **options
  )
  forward, backward = call(x, pos, gen), call(x, gen, pos)
  assert_close(backward, -forward, 5e-6)
  assert np.abs(forward).max() > 0.02
  order = np.random.default_rng(0).permutation(8)
  same = call(x, pos, pos[order])
  assert np.abs(same).max() < 3e-6 * np.abs(pos).max()


@all_fields
def test_symmetries(field, options):
  """Order of targets, a common shift, weights as repeated targets."""
  x, pos, gen, _ = arrays()
  call = functools.partial(
    jitted_field, temperature=0.5, field=field, **options
  )
  v = call(x, pos, gen)
  assert_close(call(x, pos[::-1], gen[::-1]), v, 2e-6)
  shift = np.float32([3.0, -2.0, 1.0])
  assert_close(call(x + shift, pos + shift, gen + shift), v, 1e-5)
  if field == "softmax":
    return  # weights multiply behind the softmaxes there (A.6)
  twice = jnp.concatenate([pos, pos[:1]])
  double = jnp.ones(len(pos)).at[0].set(2.0)
  none = jnp.ones(len(pos)).at[:2].set(0.0)
  assert_close(call(x, pos, gen, weight_pos=double), call(x, twice, gen), 2e-6)
  assert_close(call(x, pos, gen, weight_pos=none), call(x, pos[2:], gen), 2e-6)


def test_a_field_of_ones_own(monkeypatch):
  """One function and one line; docs/fields.md shows this one."""

  def cauchy(problem, temperature):
    def pull(y):
      k = y.weight[:, None, :] / (1.0 + y.squared / temperature**2)
      return k / k.sum(axis=-1, keepdims=True)

    return problem.each(pull)

  def straight(problem, temperature):
    """No coefficients: the means' difference, for all samples alike."""
    del temperature
    at = problem.num_negatives
    means = [
      jnp.mean(y, axis=1, keepdims=True) - problem.x
      for y in (problem.targets[:, at:], problem.targets[:, :at])
    ]
    return drift.Velocities(*means)

  monkeypatch.setitem(drift.FIELDS, "cauchy", cauchy)
  monkeypatch.setitem(drift.FIELDS, "straight", straight)
  x, pos, gen, _ = arrays()
  v = compute_field(x, pos, gen, 0.5, field="cauchy")

  def mean(y):
    k = 1 / (1 + ((y[None] - x[:, None]) ** 2).sum(-1) / 0.25)
    return (k / k.sum(-1, keepdims=True)) @ y

  assert_close(v, mean(pos) - mean(gen), 2e-6)
  for field in ("cauchy", "straight"):
    _, info = drift_loss(
      x[None],
      pos[None],
      None,
      temperatures=(0.5,),
      variant=Variant(field=field, diagnostics=True),
    )
    assert -1 <= info["extra"]["alignment"][0.5] <= 1
  v = compute_field(x, pos, gen, 0.5, field="straight")
  assert_close(v, np.broadcast_to(pos.mean(0) - gen.mean(0), v.shape), 2e-6)


def losses(variant, seed=0, **options):
  x, pos, gen, unc = (jnp.asarray(a)[None] for a in arrays(seed))
  independent = gen if variant.negatives == "independent" else None
  return drift_loss(
    x,
    pos,
    unc,
    temperatures=(0.5,),
    affinity_floor=0.0,
    variant=variant,
    independent=independent,
    **options,
  )


@all_fields
def test_gradient_stops_at_all_but_the_samples(field, options):
  x, pos, gen, unc = (jnp.asarray(a)[None] for a in arrays())
  variant = Variant(field=field, options=options, negatives="independent")

  def loss(pos, gen, unc, weight, scale):
    found, info = drift_loss(
      x,
      pos,
      unc,
      weight_neg=weight,
      temperatures=(0.5,),
      variant=variant,
      independent=gen,
      temperature_scale=scale,
    )
    return found.sum()

  gradients = jax.grad(loss, argnums=(0, 1, 2, 3, 4))(
    pos, gen, unc, jnp.ones((1, 5)), jnp.ones(())
  )
  for gradient in gradients:
    assert not np.any(gradient)


def test_diagnostics():
  """By hand: marginals of an exact plan, cosines, mass on self."""
  exact = Variant(
    field="sinkhorn",
    options={"iterations": 200},
    negatives="independent",
    diagnostics=True,
  )
  _, info = losses(exact)
  assert float(info["extra"]["marginal_error"][0.5]) < 1e-4
  assert "self_mass" not in info["extra"]
  _, info = losses(Variant(field="kl", diagnostics=True))
  assert float(info["extra"]["marginal_error"][0.5]) > 0.05
  assert float(info["extra"]["self_mass"][0.5]) == 0.0
  own = Variant(
    field="kl",
    negatives="own_with_self",
    normalize_features=False,
    diagnostics=True,
  )
  _, info = losses(own)
  x, pos, _, unc = map(np.float64, arrays())
  targets = np.concatenate([x, unc])
  k = np.exp(-np.linalg.norm(targets[None] - x[:, None], axis=-1) / 0.5)
  share = (np.diagonal(k) / k.sum(-1)).mean()
  assert_close(info["extra"]["self_mass"][0.5], share, 1e-4)
  k_pos = np.exp(-np.linalg.norm(pos[None] - x[:, None], axis=-1) / 0.5)
  pull = (k_pos / k_pos.sum(-1, keepdims=True)) @ pos - x
  push = (k / k.sum(-1, keepdims=True)) @ targets - x
  cosine = (pull * push).sum(-1) / (
    np.linalg.norm(pull, axis=-1) * np.linalg.norm(push, axis=-1)
  )
  assert_close(info["extra"]["alignment"][0.5], cosine.mean(), 1e-4)
  shares = (k_pos / k_pos.sum(-1, keepdims=True)).mean(0)
  error = 0.5 * np.abs(shares - 1 / len(pos)).sum()
  assert_close(info["extra"]["marginal_error"][0.5], error, 1e-5)


def test_adaptive_temperature_gives_so_many_neighbours():
  for wanted in (2.0, 4.0, 8.0):
    _, info = losses(Variant(field="kl", neighbours=wanted))
    # The temperature 0.5 is half of the one that was asked for.
    _, other = losses(
      Variant(field="kl"),
      temperature_scale=2.0 * info["extra"]["temperature_scale"][0.5],
    )
    assert_close(other["effective_positives"][0.5], wanted, 1e-3)


def test_a_temperature_scale_is_another_temperature():
  x, pos, _, unc = (jnp.asarray(a)[None] for a in arrays())
  a, info_a = drift_loss(x, pos, unc, temperatures=(0.5, 1.0))
  b, info_b = drift_loss(
    x,
    pos,
    unc,
    temperatures=(0.25, 0.5),
    temperature_scale=jnp.asarray(2.0),
  )
  assert_close(a, b, 1e-6)
  assert_close(info_a["drift_ms"][1.0], info_b["drift_ms"][0.5], 1e-6)


def test_temperature_gradient_is_of_the_likelihood():
  """Of the best candidate of each problem, by central differences."""
  variant = Variant(learned=True, normalize_features=False)
  _, info = losses(variant)
  x, pos, _, unc = map(np.float64, arrays())

  def objective(log_tau):
    y = np.concatenate([x, unc, pos])
    d = np.linalg.norm(y[None] - x[:, None], axis=-1)
    np.fill_diagonal(d, 1e6)
    k = np.exp(-d / np.exp(log_tau))
    return (-np.log(k[:, -len(pos) :].sum(-1) / k.sum(-1))).min()

  at, step = math.log(0.5), 1e-5
  expected = (objective(at + step) - objective(at - step)) / (2 * step)
  assert_close(info["extra"]["temperature_gradient"][0.5], expected, 1e-4)


@pytest.mark.slow
def test_nothing_is_nan_at_the_edges():
  """Coincident points, tiny temperatures, weights of zero; own or not."""
  x = jnp.zeros((1, 4, 3))
  far = jnp.full((1, 4, 3), 1e3)
  spread = jnp.arange(12.0).reshape(1, 4, 3) ** 2
  # Annealed as far as configs allow.
  scales = (1.0, config_lib.LEAST_TEMPERATURE_SCALE)

  def summed(gen, pos, scale, variant, independent):
    loss, info = drift_loss(
      gen,
      pos,
      far,
      weight_neg=jnp.zeros((1, 4)),
      weight_gen=jnp.zeros((1, 4)),
      temperatures=(1e-3,),
      variant=variant,
      independent=independent,
      temperature_scale=scale,
    )
    return loss.sum(), (loss, info)

  loss_of = jax.jit(jax.grad(summed, has_aux=True), static_argnames="variant")
  # Negatives of their own differ in the mask alone.
  of_their_own = [(name, options) for name, options in FIELDS if not options]
  for (field, options), negatives in [
    *((each, "own") for each in FIELDS),
    *((each, "independent") for each in of_their_own),
  ]:
    variant = Variant(
      field=field,
      options=options,
      negatives=negatives,
      diagnostics=True,
    )
    others = x if negatives == "independent" else None
    for gen, pos, scale in itertools.product((x, spread), (x, far), scales):
      values = loss_of(gen, pos, jnp.asarray(scale), variant, others)
      for value in jax.tree.leaves(values):
        assert np.isfinite(value).all(), variant

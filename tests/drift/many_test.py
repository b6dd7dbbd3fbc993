"""The drifting losses of many features: the on-chip kernels, interpreted.

The plain loss is their oracle; loss_test holds it to the golden arrays and to
float64.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from drift_jax import drift
from drift_jax.drift import fused
from tests.conftest import assert_close, kernel_costs

# {key: (locations, channels)}: several of one width, widths in one and in
# several parts, widths that are never on chip.
KEYS = {
  "map": (5, 96),
  "map_mean": (1, 96),
  "wide": (2, 1024),
  "narrow": (3, 7),
  "narrow_too": (3, 7),
}
# One on chip in one part, one in several.
ON_CHIP = {"map": (5, 96), "wide": (2, 1024)}
# Enough for options.
MAP = {"map": (5, 96)}
# Enough for what features share: one on chip, one not.
BOTH = {"map": (5, 96), "narrow": (3, 7)}
SIZES = {"n": 8, "positives": 6, "unconditional": 3}
PLAIN = {"affinity_floor": 0.0}
OPTIONS: dict[str, Any] = {"temperatures": (0.02, 0.05, 0.2)}


def make(
  labels: int = 2,
  *,
  offset: float = 0.0,
  dtype: Any = jnp.float32,
  unconditional: int = 3,
  keys: Any = KEYS,
):
  """(generated, real, weights) of standard normal features."""
  rng = np.random.default_rng(0)
  n, reals = SIZES["n"], SIZES["positives"] + unconditional

  def features(count: int, shift: float):
    return {
      key: jnp.asarray(rng.normal(size=(labels, count, *size)) + shift, dtype)
      for key, size in keys.items()
    }

  weights = jnp.asarray(rng.uniform(0.5, 3.0, labels), jnp.float32)
  return features(n, offset), features(reals, offset + 0.5), weights


def results(generated, real, weights, *, kernel, options=()):
  """({key: loss}, {key: info}, gradients of a weighted sum)."""

  def total(generated):
    losses, report = drift.drift_losses(
      generated,
      real,
      weights,
      num_unconditional=SIZES["unconditional"],
      num_positives=SIZES["positives"],
      kernel=kernel,
      **(OPTIONS | dict(options)),
    )
    factors = {key: 1.0 + i for i, key in enumerate(generated)}
    factors = jnp.asarray([factors[key] for key in report.keys])
    return jnp.sum(factors * losses), (losses, report)

  (_, (losses, report)), grads = jax.value_and_grad(total, has_aux=True)(
    generated
  )
  by_key = dict(zip(report.keys, losses, strict=True))
  return by_key, {key: report.of(key) for key in report.keys}, grads


run = jax.jit(results, static_argnames=("kernel", "options"))


def assert_same(
  inputs, options: Any = (), *, rtol: float = 1e-5, gradient_rtol: float = 0.0
):
  plain = run(*inputs, kernel="xla", options=options)
  fused = run(*inputs, kernel="interpret", options=options)
  assert set(fused[0]) == set(inputs[0])
  for key in inputs[0]:
    assert_close(fused[0][key], plain[0][key], rtol, key)
    for a, b in zip(
      jax.tree.leaves(fused[1][key]),
      jax.tree.leaves(plain[1][key]),
      strict=True,
    ):
      assert_close(a, b, rtol, key)
    assert fused[2][key].dtype == inputs[0][key].dtype
    assert_close(
      fused[2][key].astype(jnp.float32),
      plain[2][key].astype(jnp.float32),
      gradient_rtol or rtol,
      key,
    )


# Name -> arguments of `make`, options, arguments of `assert_same`.
CASES: dict[str, Any] = {
  "xy": ({"keys": MAP}, {"attraction": 1.5, "repulsion": 0.5}, {}),
  "wide": ({"keys": ON_CHIP}, PLAIN | {"attraction": 1.5}, {}),
  "y": ({"keys": MAP}, PLAIN | {"normalization": "y"}, {}),
  # exp(-d / tau) magnifies a rounding of d by d / tau, here up to 50.
  "none": ({"keys": MAP}, PLAIN | {"normalization": "none"}, {"rtol": 3e-5}),
  "far": ({"offset": 100.0}, {}, {}),
  "no reals": (
    {"unconditional": 0, "keys": MAP},
    {"temperatures": (0.05,)},
    {},
  ),
  "extra negatives": ({"unconditional": 3 + 4, "keys": MAP}, {}, {}),
  # A rounding of the gradient apart where float32 rounds the other way.
  "bfloat16": (
    *({"dtype": jnp.bfloat16, "keys": ON_CHIP}, {}),
    {"gradient_rtol": 3e-4},
  ),
}


def wflow_variant(cost, iterations, own_in_scale):
  return drift.Variant(
    field="sinkhorn",
    options={"cost": cost, "iterations": iterations},
    negatives="independent",
    guidance="velocity",
    own_in_scale=own_in_scale,
  )


@pytest.mark.parametrize(
  ("cost", "iterations", "temperatures", "own_in_scale"),
  [
    ("quadratic", 10, (0.05,), True),
    pytest.param("l2", 1, (0.1, 0.5), False, marks=pytest.mark.slow),
  ],
)
def test_kernels_of_wflow_give_the_plain_numbers(
  cost, iterations, temperatures, own_in_scale
):
  """Positives, unconditional reals, and a second batch of 11."""
  variant = wflow_variant(cost, iterations, own_in_scale)
  assert variant.has_kernel
  inputs = make(unconditional=3 + 11, keys=ON_CHIP)
  options = (("variant", variant), ("temperatures", temperatures))
  assert_same(inputs, options)


def test_many_wide_targets_are_not_on_chip():
  """12 MiB of a problem's features in float32 are the most."""
  x = jnp.zeros((1, 64, 1, 8192), jnp.bfloat16)
  assert fused.fits(x, 320, (0.1,)) and not fused.fits(x, 321, (0.1,))


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "xy"))
    for name in CASES
  ],
)
def test_kernels_give_the_plain_numbers(name):
  inputs, options, tolerances = CASES[name]
  assert_same(make(**inputs), tuple(options.items()), **tolerances)


@pytest.mark.slow
def test_coincident_samples():
  generated, real, weights = make()
  generated = {key: x.at[:, 1].set(x[:, 0]) for key, x in generated.items()}
  real = {key: y.at[:, 0].set(generated[key][:, 0]) for key, y in real.items()}
  # Their distances are the rounding of the gram expansion, by either form: the
  # tolerance is the golden arrays' for duplicates.
  assert_same((generated, real, weights), rtol=5e-3)


def test_wide_features_are_on_chip_and_few_calls_do_them():
  jaxpr = str(
    jax.make_jaxpr(functools.partial(results, kernel="interpret"))(*make())
  )
  # Three passes for each of the two wide widths.
  assert jaxpr.count("pallas_call[") == 6
  jaxpr = str(jax.make_jaxpr(functools.partial(results, kernel="xla"))(*make()))
  assert "pallas_call[" not in jaxpr


def test_declared_cost_is_the_hand_count():
  inputs = make(keys={"map": (5, 96), "map_mean": (1, 96)}, dtype=jnp.bfloat16)
  jaxpr = jax.make_jaxpr(functools.partial(results, kernel="interpret"))(
    *inputs
  )
  distances, statistics, force = kernel_costs(jaxpr.jaxpr)
  problems, n, reals, channels = 2 * 6, 8, 9, 96
  pairs = n * (n + reals)
  # One product of all pairs; one for each of 3 temperatures; one.
  product = 2 * problems * pairs * channels
  assert [distances.flops, statistics.flops, force.flops] == [
    product,
    3 * product,
    product,
  ]
  # bfloat16 features, float32 weights; matrices; a row of scalars or sums.
  features = problems * ((n + reals) * channels * 2 + (n + reals) * 4)
  matrices, row = problems * pairs * 4, problems * 128 * 4
  assert distances.bytes_accessed == features + matrices + row
  assert statistics.bytes_accessed == features + matrices + 2 * row
  gradient = problems * n * channels * 2
  assert force.bytes_accessed == features + matrices + row + gradient


def test_declared_cost_of_wflow_is_the_hand_count():
  """Exponentials: of rows and of columns in 10 iterations, rows, neighbours."""
  variant = wflow_variant("quadratic", 10, True)
  options = (("variant", variant), ("temperatures", (0.05,)))
  jaxpr = jax.make_jaxpr(
    functools.partial(results, kernel="interpret", options=options)
  )(*make(unconditional=3 + 8, keys=MAP))
  distances, plans, pull = kernel_costs(jaxpr.jaxpr)
  problems, n, reals, channels = 2 * 5, 8, 17, 96
  product = 2 * problems * n * reals * channels
  assert [distances.flops, plans.flops, pull.flops] == [
    2 * problems * n * (n + reals) * channels,
    product,
    product,
  ]
  assert plans.transcendentals == problems * n * reals * 22
  # Features, plans and a row of scalars; the gradient.
  features, row = problems * (n + reals) * channels * 4, problems * 128 * 4
  matrix = problems * n * reals * 4
  assert plans.bytes_accessed == features + 2 * matrix + 2 * row
  gradient = problems * n * channels * 4
  assert pull.bytes_accessed == features + matrix + row + gradient


@pytest.mark.slow
@pytest.mark.parametrize("is_wflow", [False, True])
def test_scalars_are_shared_over_devices(is_wflow):
  inputs = make(keys=BOTH, unconditional=3 + 8 * is_wflow)
  options = ()
  if is_wflow:
    variant = wflow_variant("quadratic", 10, True)
    options = (("variant", variant), ("temperatures", (0.05,)))
  whole = run(*inputs, kernel="interpret", options=options)
  mesh = jax.make_mesh(
    (2,),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:2],
  )
  split = PartitionSpec("data")

  def local(generated, real, weights):
    losses, info, grads = results(
      generated,
      real,
      weights,
      kernel="interpret",
      options=(("axis_name", ("data",)), *options),
    )
    return jax.lax.pmean(losses, "data"), info, grads

  losses, info, grads = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(split, split, split),
      out_specs=(PartitionSpec(), PartitionSpec(), split),
      check_vma=False,
    )
  )(*inputs)
  for key in BOTH:
    assert_close(losses[key], whole[0][key], 1e-5, key)
    assert_close(info[key]["scale"], whole[1][key]["scale"], 1e-6, key)
    # A device's gradient is that of the mean over its own label.
    assert_close(grads[key] / 2, whole[2][key], 1e-5, key)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_early_gradients_are_the_plain_ones(dtype):
  """They are kept in the features' dtype, and nothing of them in float32."""
  inputs = make(dtype=dtype, keys=BOTH)
  plain, early = (run(*inputs, kernel=kernel) for kernel in ("xla", "early"))
  for a, b in zip(*map(jax.tree.leaves, (early, plain)), strict=True):
    # A factor that is no power of two rounds the gradient once more.
    rtol = 1e-5 if a.dtype == jnp.float32 else 2**-7
    assert_close(a.astype(jnp.float32), b.astype(jnp.float32), rtol)

  def kept(kernel):
    def losses(generated):
      return drift.drift_losses(
        generated,
        *inputs[1:],
        num_positives=SIZES["positives"],
        kernel=kernel,
        **OPTIONS,
      )[0]

    shapes = jax.eval_shape(lambda x: jax.vjp(losses, x)[1], inputs[0])
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

  size = sum(x.nbytes for x in inputs[0].values())
  assert kept("early") == size and kept("xla") >= sum(
    4 * x.size for x in inputs[0].values()
  )


@pytest.mark.parametrize("kernel", ["xla", "early"])
def test_a_temperature_scale_has_no_gradient(kernel):
  generated, *others = make(keys=BOTH)

  @jax.checkpoint
  def loss(generated, scale):
    return drift.drift_losses(
      *(generated, *others),
      num_positives=SIZES["positives"],
      kernel=kernel,
      temperature_scale=scale,
      **OPTIONS,
    )[0].sum()

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
  gradients = gradients(generated, jnp.float32(1.5))
  assert gradients[1] == 0 and all(x.any() for x in gradients[0].values())


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["xla", "interpret", "early"])
def test_parts_with_the_scalars_of_the_whole(kernel):
  whole = make(keys=BOTH)
  losses, info, grads = run(*whole, kernel=kernel)

  @functools.partial(jax.jit, static_argnames="known")
  def of_half(inputs, known):
    _, report = drift.drift_losses(
      *inputs, num_positives=SIZES["positives"], kernel=kernel, **OPTIONS
    )
    whole_info = jax.tree.map(
      lambda *values: jnp.stack(values), *(info[key] for key in report.keys)
    )
    scalars = drift.Scalars(
      whole_info["scale"], whole_info["drift_ms"] if known else None
    )
    return results(*inputs, kernel=kernel, options=(("scalars", scalars),))

  halves = [jax.tree.map(lambda x, i=i: x[i : i + 1], whole) for i in (0, 1)]
  found = [of_half(half, True) for half in halves]
  half_known = [of_half(half, False)[1] for half in halves]
  for key in BOTH:
    assert_close((found[0][0][key] + found[1][0][key]) / 2, losses[key], 1e-5)
    both = jnp.concatenate([found[0][2][key], found[1][2][key]])
    assert_close(both / 2, grads[key], 1e-5, key)
    for t, expected in info[key]["drift_ms"].items():
      parts = [half[key]["drift_ms"][t] for half in half_known]
      assert_close((parts[0] + parts[1]) / 2, expected, 1e-5, key)
      assert_close(found[0][1][key]["drift_ms"][t], expected, 1e-6, key)


@pytest.mark.slow
def test_problems_that_do_not_fill_the_last_block(monkeypatch):
  monkeypatch.setattr(fused, "_BLOCK", 4 * 17 * 128 * 4)
  run.clear_cache()
  assert_same(make(keys=MAP))
  run.clear_cache()

"""What public functions refuse: an error names the value and the remedy."""

import functools
import math

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from drift_jax import drift
from drift_jax.drift import Variant


def ones(*shape):
  return jnp.ones(shape, jnp.float32)


def loss(gen=(1, 6, 2), pos=(1, 8, 2), neg=(1, 4, 2), **options):
  """Of features of these shapes, or None."""
  features = (
    None if shape is None else ones(*shape) for shape in (gen, pos, neg)
  )
  return drift.drift_loss(*features, **{"temperatures": (0.2,), **options})


def losses(generated=(2, 4, 1, 2), real=(2, 5, 1, 2), labels=2, **options):
  return drift.drift_losses(
    {"a": ones(*generated)},
    {"a": ones(*real)},
    ones(labels),
    **{"num_positives": 3, "temperatures": (0.2,), **options},
  )


def v(x=(4, 2), y_pos=(5, 2), y_neg=(3, 2), temperature=0.2, **options):
  return drift.compute_v(
    *(ones(*shape) for shape in (x, y_pos, y_neg)),
    temperature,
    **{"mask_self": False, **options},
  )


def field(x=(4, 2), y_pos=(5, 2), y_neg=(3, 2), **options):
  return drift.compute_field(
    *(ones(*shape) for shape in (x, y_pos, y_neg)), 0.2, field="kl", **options
  )


def pool(shape=(1, 4, 4, 2), **options):
  defaults = {"patch_mean_size": (), "patch_std_size": ()}
  defaults |= {"use_mean": True, "use_std": False}
  return drift.pooled_features(ones(*shape), "a", **(defaults | options))


def alpha(**options):
  defaults = {
    "minimum": 1.0,
    "maximum": 4.0,
    "exponent": 3.0,
    "no_cfg_frac": 0.0,
  }
  return drift.sample_alpha(jax.random.key(0), (4,), **(defaults | options))


INDEPENDENT = {"variant": Variant(negatives="independent")}
# (a call, what its error says).
TABLE = [
  # Axes.
  (
    lambda: loss((4, 2)),
    r"gen has .*\(4, 2\), want \[B, N, C\]: .*gen\[None\]",
  ),
  (lambda: loss((1, 4, 8, 2)), r"gen .* want \[B, N, C\]: flatten"),
  (lambda: loss(pos=(1, 8, 6)), r"pos has shape \(1, 8, 6\)"),
  (
    lambda: loss(independent=ones(4, 2), **INDEPENDENT),
    r"independent has shape \(4, 2\), want \[B, I, C\]",
  ),
  (lambda: v((1, 4, 2)), r"x has shape \(1, 4, 2\), want \[N, D\]: .*vmap"),
  (
    lambda: losses((2, 4, 2)),
    r"generated\['a'\] .*\[L, N, T, C\]: .*x\[:, :, None",
  ),
  (
    lambda: losses(num_positives=6),
    r"num_positives=6: real\['a'\] has 5 samples",
  ),
  (
    lambda: drift.drift_losses(
      {"a": ones(2, 4, 1, 2)}, {}, ones(2), num_positives=3, temperatures=0.2
    ),
    r"the features \['a'\], real \[\]: give at least one",
  ),
  (
    lambda: drift.squared_distances(ones(4), ones(5)),
    r"x has shape \(4,\), want \[..., N, C\]",
  ),
  (
    lambda: drift.mean_shift(ones(4, 2), ones(5, 2), ones(4, 4)),
    "w has shape .* T=5 as y has",
  ),
  (lambda: pool((8, 8, 2)), r"feature_map .*\[B, H, W, C\]: .*x\[None\]"),
  # Weights, and samples that are given or not.
  (lambda: loss(weight_gen=ones(1, 5)), r"weight_gen .*\(1, 6\)"),
  (lambda: loss(neg=None, weight_neg=ones(1, 4)), "neg is None"),
  (lambda: loss(**INDEPENDENT), "'independent', .* are not given"),
  (lambda: v(mask_self=True), "as many rows; got 4 and 3"),
  (
    lambda: loss(variant=Variant(neighbours=8.0)),
    "neighbours=8.0 .*positives, 8",
  ),
  # Numbers.
  *(
    (lambda t=t: v(temperature=t), f"temperature={t}")
    for t in (0.0, -1.0, math.nan)
  ),
  (lambda: loss(temperatures=()), "at least one"),
  (lambda: loss(temperatures=(0.2, 0.2)), "none twice"),
  (lambda: loss(affinity_floor=-1.0), "affinity_floor=-1.0"),
  (lambda: pool(patch_std_size=(0,)), "patch_std_size contains 0"),
  (lambda: alpha(minimum=0.5), "minimum=0.5, maximum=4.0"),
  (lambda: alpha(maximum=math.inf), "maximum=inf"),
  (lambda: alpha(no_cfg_frac=1.5), "no_cfg_frac=1.5"),
  (lambda: drift.unconditional_weight(ones(3), 64, 0), "n_unc=0"),
  # Names.
  (lambda: v(normalization="x"), "'x' is unknown.*xy, y, none"),
  (lambda: losses(kernel="cuda"), "kernel='cuda' is unknown; valid"),
  *(
    (functools.partial(Variant, **arguments), message)
    for arguments, message in (
      ({"field": "sinkhor"}, "'sinkhor' is unknown.*softmax, mmd"),
      ({"field": "kl", "options": {"cost": "l2"}}, "options.cost .*kernel"),
      ({"field": "kl", "options": {"kernel": "box"}}, "'box'.*laplace, gauss"),
      ({"field": "sinkhorn", "options": {"iterations": 1.5}}, "iterations=1.5"),
      ({"options": {"affinity_floor": 0.1}}, "own arguments"),
      ({"negatives": "others"}, "negatives='others'.*own, own_with_self"),
      ({"guidance": "both"}, "guidance='both'.*negatives, velocity"),
      ({"guidance": "velocity"}, "'softmax' does not.*mmd, kl"),
      ({"neighbours": 0.5}, "neighbours=0.5"),
    )
  ),
]


@pytest.fixture(autouse=True)
def no_annotations():
  """They would catch it first; users don't have them."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(("call", "message"), TABLE)
def test_errors_name_value_and_remedy(call, message):
  with pytest.raises(ValueError, match=message):
    call()

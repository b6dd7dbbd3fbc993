"""Arrays of other axes than a public function takes, named with the remedy."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from drift_jax import drift

LOSS = functools.partial(drift.drift_loss, temperatures=(0.2,))
LOSSES = functools.partial(
  drift.drift_losses, num_positives=3, temperatures=(0.2,)
)
FIELD = functools.partial(drift.compute_field, temperature=0.2, field="softmax")
V = functools.partial(drift.compute_v, temperature=0.2, mask_self=False)
POOL = functools.partial(
  drift.pooled_features,
  name="a",
  patch_mean_size=(),
  patch_std_size=(),
  use_mean=True,
  use_std=False,
)
INDEPENDENT = drift.Variant(negatives="independent")


def ones(*shape):
  return jnp.ones(shape, jnp.float32)


def features(*shape):
  return {"a": ones(*shape)}


@pytest.fixture(autouse=True)
def no_annotations():
  """They would catch it first; users don't have them."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
  ("function", "message"),
  [
    (
      lambda: LOSS(ones(4, 2), ones(5, 2), ones(3, 2)),
      r"gen has shape \(4, 2\), want \[B, N, C\]: .*gen\[None\]",
    ),
    (lambda: LOSS(ones(4, 2), ones(5, 2), None), r"gen has shape \(4, 2\)"),
    (lambda: LOSS(ones(1, 4, 2), ones(5, 2), None), r"pos has shape \(5, 2\)"),
    (
      lambda: LOSS(
        ones(1, 4, 2),
        ones(1, 5, 2),
        None,
        variant=INDEPENDENT,
        independent=ones(4, 2),
      ),
      r"independent has shape \(4, 2\), want \[B, I, C\]",
    ),
    (
      lambda: V(ones(1, 4, 2), ones(1, 5, 2), ones(1, 3, 2)),
      r"x has shape \(1, 4, 2\), want \[N, D\]: .*vmap",
    ),
    (
      lambda: V(ones(4, 2), ones(5, 3), ones(3, 2)),
      r"y_pos has shape \(5, 3\), .* D=2 as x has",
    ),
    (
      lambda: FIELD(ones(1, 4, 2), ones(1, 5, 2), ones(1, 3, 2)),
      r"x has shape \(1, 4, 2\), want \[N, D\]: .*vmap",
    ),
    (
      lambda: LOSSES(features(2, 4, 2), features(2, 5, 2), ones(2)),
      r"generated\['a'\] has shape .*\[L, N, T, C\]: .*x\[:, :, None\]",
    ),
    (
      lambda: LOSSES(features(2, 4, 1, 2), features(2, 5, 1, 2), ones(3)),
      r"generated\['a'\] .* L=3 as weight_unconditional has",
    ),
    (
      lambda: LOSSES(features(2, 4, 1, 2), features(2, 2, 1, 2), ones(2)),
      r"num_positives=3: real\['a'\] has 2 samples",
    ),
    (
      lambda: LOSSES(features(2, 4, 1, 2), {"b": ones(2, 5, 1, 2)}, ones(2)),
      r"the features \['a'\], real \['b'\]",
    ),
    (lambda: LOSSES({}, {}, ones(2)), "give at least one"),
    (
      lambda: drift.squared_distances(ones(4), ones(5)),
      r"x has shape \(4,\), want \[..., N, C\]",
    ),
    (
      lambda: drift.affinities(ones(4), 0.2),
      r"squared_distance has shape \(4,\), want \[..., N, T\]",
    ),
    (
      lambda: drift.product_coefficients(ones(4, 2), ones(5, 2)),
      "affinity_neg .* N=4 as affinity_pos has",
    ),
    (
      lambda: drift.mean_shift(ones(4, 2), ones(5, 2), ones(4, 4)),
      "w has shape .* T=5 as y has",
    ),
    (lambda: POOL(ones(8, 8, 2)), r"feature_map .*\[B, H, W, C\]: .*x\[None\]"),
    (
      lambda: drift.root_mean_square(ones(8, 8, 2)),
      r"x has shape \(8, 8, 2\), want \[B, H, W, C\]",
    ),
  ],
)
def test_other_axes_are_named(function, message):
  with pytest.raises(ValueError, match=message):
    function()


@pytest.mark.parametrize("temperature", [0.2, np.float32(0.2), np.array(0.2)])
def test_a_single_temperature(temperature):
  @jax.jit
  def losses(gen, pos):
    loss, _ = drift.drift_loss(gen, pos, None, temperatures=temperature)
    return loss, LOSS(gen, pos, None)[0]

  loss, expected = losses(ones(1, 3, 2), ones(1, 4, 2))
  assert (loss == expected).all()

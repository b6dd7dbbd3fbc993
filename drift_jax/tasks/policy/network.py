"""A policy: observations and noise -> actions, in one call of its U-Net."""

from collections.abc import Mapping

import flax.linen as nn
from jaxtyping import Array, ArrayLike, Float, Int, Shaped

from drift_jax.tasks.policy.observations import ObservationEncoder
from drift_jax.tasks.policy.unet1d import ConditionalUnet1d


class Policy(nn.Module):
  """actions = unet(noise, encoder(observations)).

  Encoding is apart, so that many actions of one observation cost one encoding.
  """

  encoder: ObservationEncoder
  unet: ConditionalUnet1d

  def encode(
    self,
    observations: Mapping[str, Shaped[ArrayLike, "B To ..."]],
    offsets: Int[ArrayLike, "B 2"] | None = None,
  ) -> Float[Array, "B C"]:
    """The condition; see ObservationEncoder."""
    return self.encoder(observations, offsets)

  def act(
    self,
    noise: Float[Array, "N T A"],
    condition: Float[Array, "N C"],
    time: Int[Array, " N"] | None = None,
  ) -> Float[Array, "N T A"]:
    """Normalised actions; see ConditionalUnet1d."""
    return self.unet(noise, condition, time)

  def __call__(
    self,
    observations: Mapping[str, Shaped[ArrayLike, "B To ..."]],
    noise: Float[Array, "B T A"],
    time: Int[Array, " B"] | None = None,
    offsets: Int[ArrayLike, "B 2"] | None = None,
  ) -> Float[Array, "B T A"]:
    """One sequence of actions of each observation."""
    return self.act(noise, self.encode(observations, offsets), time)

"""A policy: observations and noise -> actions, in one call of its U-Net."""

from collections.abc import Mapping

import flax.linen as nn
from jaxtyping import Array, ArrayLike, Float, Int, Shaped

from drift_jax.tasks.policy.observations import ObservationEncoder
from drift_jax.tasks.policy.unet1d import ConditionalUnet1d

Observations = Mapping[str, Shaped[ArrayLike, "B To ..."]]
Offsets = Int[ArrayLike, "B 2"] | None
Condition = Float[Array, "B C"]
Actions = Float[Array, "B T A"]
Time = Int[Array, " B"] | None


class Policy(nn.Module):
  """actions = unet(noise, encoder(observations)).

  Encoding is apart, so that many actions of one observation cost one encoding.
  """

  encoder: ObservationEncoder
  unet: ConditionalUnet1d

  def encode(self, seen: Observations, offsets: Offsets = None) -> Condition:
    """The condition; see ObservationEncoder."""
    return self.encoder(seen, offsets)

  def act(
    self, noise: Actions, condition: Condition, time: Time = None
  ) -> Actions:
    """Normalised actions; see ConditionalUnet1d."""
    return self.unet(noise, condition, time)

  def __call__(
    self, seen: Observations, noise: Actions, time: Time = None
  ) -> Actions:
    """One sequence of actions of each observation."""
    return self.act(noise, self.encode(seen), time)

"""The Inception-v3 of FID, as pytorch-fid and torch-fidelity publish it."""

from flax import traverse_util

from drift_jax.models import release
from drift_jax.tools.conversions.layouts import (
  BATCH_NORM,
  COUNTER,
  Config,
  Converted,
  Weights,
  WeightsError,
  fold_batch_norm,
  jax_layout,
  torch_shape,
)

MODEL_CONFIG = {"width": 16, "num_classes": 1008}
BATCH_NORM_EPSILON = 1e-3


def convert_inception(weights: Weights, config: Config | None) -> Converted:
  """pytorch-fid's state dict -> kind 'inception'.

  BatchNorm is folded into the convolution before it, see fold_batch_norm.

  Args:
    weights: torch's layouts (OIHW convolutions); any floating dtype.
    config: not looked at.

  Raises:
    WeightsError: names, shapes or values that do not fit.
  """
  del config
  shapes = release.parameter_shapes("inception", MODEL_CONFIG)
  try:
    release.require_parameters(
      "these are not the weights of FID's Inception-v3",
      {k: v for k, v in weights.items() if not k.endswith(COUNTER)},
      published_shapes(shapes),
    )
  except ValueError as error:
    raise WeightsError(str(error)) from error
  params = {}
  for path in shapes:
    module, _, leaf = path.rpartition("/")
    name = module.replace("/", ".")
    if module == "fc":
      torch_name = f"{name}.{'weight' if leaf == 'kernel' else leaf}"
      params[path] = jax_layout(torch_name, weights[torch_name])
    elif leaf == "kernel":
      params[path], params[f"{module}/bias"] = fold_batch_norm(
        f"{name}.conv", f"{name}.bn", weights, BATCH_NORM_EPSILON
      )
  return Converted(
    dict(MODEL_CONFIG), traverse_util.unflatten_dict(params, sep="/")
  )


def published_shapes(
  shapes: dict[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
  """Names and shapes in pytorch-fid's state dict of those here."""
  published = {}
  for path, shape in shapes.items():
    module, _, leaf = path.rpartition("/")
    name = module.replace("/", ".")
    if module == "fc":
      leaf = "weight" if leaf == "kernel" else leaf
      published[f"{name}.{leaf}"] = torch_shape(shape)
    elif leaf == "kernel":
      published[f"{name}.conv.weight"] = torch_shape(shape)
    else:
      published |= {f"{name}.bn.{key}": shape for key in BATCH_NORM}
  return published

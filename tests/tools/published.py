"""Stand-ins for torch and its files, and what becomes of BatchNorms."""

import sys
import types

import numpy as np

from tests.conftest import assert_close


class Tensor:
  """As much of torch.Tensor as is read."""

  def __init__(self, array: np.ndarray):
    self.array = array
    self.dtype = array.dtype.name

  def float(self) -> "Tensor":
    return Tensor(self.array.astype(np.float32))

  def numpy(self) -> np.ndarray:
    assert self.dtype != "bfloat16", "torch refuses it too"
    return self.array


def as_tensors(weights):
  return {k: Tensor(np.asarray(v)) for k, v in weights.items()}


def fake_torch(monkeypatch, read):
  """A torch whose `load` gives read(path), if it is told to load safely."""

  def load(path, *, map_location, weights_only):
    assert (map_location, weights_only) == ("cpu", True)
    return read(path)

  torch = types.SimpleNamespace(load=load, Tensor=Tensor, bfloat16="bfloat16")
  monkeypatch.setitem(sys.modules, "torch", torch)


def check_folded(ours, weights, conv, norm, epsilon, rtol):
  """Our kernel and bias are a convolution and its BatchNorm, in float64."""
  kernel = weights[f"{conv}.weight"].astype(np.float64)
  gamma, beta, mean, variance = (
    weights[f"{norm}.{leaf}"].astype(np.float64)
    for leaf in ("weight", "bias", "running_mean", "running_var")
  )
  x = np.random.RandomState(6).randn(*kernel.shape[1:])
  y = np.einsum("oihw,ihw->o", kernel, x)
  y = (y - mean) / np.sqrt(variance + epsilon) * gamma + beta
  assert {leaf.dtype for leaf in ours.values()} == {np.dtype(np.float32)}
  folded = np.einsum("hwio,ihw->o", ours["kernel"].astype(np.float64), x)
  assert_close(folded + ours["bias"], y, rtol)

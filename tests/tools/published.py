"""A stand-in for torch and its files."""

import sys
import types
import zipfile

import numpy as np


class Tensor:
  """As much of torch.Tensor as is read."""

  def __init__(self, array: np.ndarray):
    self.array = array
    self.dtype = array.dtype.name
    self.shape = array.shape

  def detach(self) -> "Tensor":
    return self

  def float(self) -> "Tensor":
    return Tensor(self.array.astype(np.float32))

  def numpy(self) -> np.ndarray:
    assert self.dtype != "bfloat16", "torch refuses it too"
    return self.array


def as_tensors(weights):
  return {k: Tensor(np.asarray(v)) for k, v in weights.items()}


DTYPES = {"bfloat16": "bfloat16", "float32": "float32"}


def fake_torch(monkeypatch, read):
  """A torch whose `load` gives read(path), if it is told to load safely."""

  def load(path, *, map_location, weights_only, mmap=False):
    assert (map_location, weights_only) == ("cpu", True)
    assert not mmap or zipfile.is_zipfile(path), "torch maps no other file"
    return read(path)

  torch = types.SimpleNamespace(load=load, Tensor=Tensor, **DTYPES)
  monkeypatch.setitem(sys.modules, "torch", torch)

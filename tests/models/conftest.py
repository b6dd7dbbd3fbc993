"""Golden models: the release's configurations and parameters, loaded here."""

import json

import pytest
from flax import traverse_util

from tests.conftest import GOLDEN
from tests.models.published import under


@pytest.fixture(scope="session")
def golden_json():
  """Loads tests/golden/NAME.json."""

  def load(name: str):
    return json.loads((GOLDEN / f"{name}.json").read_text())

  return load


@pytest.fixture(scope="session")
def release_params(golden):
  """The `params/...` arrays of tests/golden/NAME.npz as a nested dict."""

  def load(name: str):
    flat = under("params/", golden(name))
    return traverse_util.unflatten_dict(flat, sep="/")

  return load

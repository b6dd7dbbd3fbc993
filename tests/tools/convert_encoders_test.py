"""Feature encoders of public files: MoCo-v2, SimCLR, ConvNeXt-V2.

models/resnet_test.py and convnext_test.py have their numbers.
"""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from drift_jax.training import artifacts
from drift_jax.training.conversions import convnext, resnet
from drift_jax.training.conversions.convert import convert
from drift_jax.training.conversions.layouts import WeightsError
from tests.models.published import draw_all
from tests.tools.published import as_tensors, fake_torch

PREFIX = "module.encoder_q."


@pytest.fixture
def resnet_weights(golden):
  """A narrow ResNet under torchvision's names."""
  return draw_all(golden("resnet")["parameters"])


@pytest.fixture
def convnext_weights(golden):
  """A narrow ConvNeXt-V2 under timm's names."""
  return draw_all(golden("convnextv2")["parameters_timm"])


def moco_state(weights):
  """A checkpoint's state_dict as MoCo's training writes it."""
  whole = {PREFIX + k: v for k, v in weights.items()}
  whole |= {f"{PREFIX}fc.{i}.weight": zeros(2, 2) for i in (0, 2)}
  whole[f"{PREFIX}bn1.num_batches_tracked"] = np.array(9)
  slow = {k.replace("_q.", "_k."): v + 1 for k, v in whole.items()}
  queue = {"module.queue": zeros(2, 8), "module.queue_ptr": np.zeros(1, int)}
  return whole | slow | queue


def zeros(*shape):
  return np.zeros(shape, np.float32)


def test_moco_from_its_checkpoint(resnet_weights, tmp_path, monkeypatch):
  """Read with torch, which is a stand-in: it isn't needed to run the tests."""
  (tmp_path / "moco_v2_800ep_pretrain.pth.tar").touch()
  state = moco_state(resnet_weights)
  content = {"epoch": 800, "state_dict": as_tensors(state), "optimizer": {}}
  fake_torch(monkeypatch, lambda _: content)
  artifact = convert("moco", str(tmp_path), str(tmp_path / "out"))
  assert artifact.kind == "resnet"
  assert artifact.metadata["source"]["family"] == "moco"
  assert artifact.metadata["model_config"] == {
    "layers": [1, 2, 6, 1],
    "base_channels": 4,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
  }
  bare = resnet.convert_moco(resnet_weights, None).params
  jax.tree.map(np.testing.assert_array_equal, artifact.params, bare)
  rough = artifacts.load(tmp_path / "out", dtype="bfloat16")
  assert {x.dtype.name for x in jax.tree.leaves(rough.params)} == {"bfloat16"}


def test_simclr_takes_pixels_as_they_are(resnet_weights, tmp_path):
  counter = {"layer1.0.bn1.num_batches_tracked": np.array(7)}
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(resnet_weights | counter, path)
  artifact = convert("simclr", str(tmp_path), str(tmp_path / "out"))
  config = artifact.metadata["model_config"]
  assert (config["image_mean"], config["image_std"]) == ([0.0] * 3, [1.0] * 3)
  assert artifact.metadata["source"]["family"] == "simclr"
  assert artifact.params["stage3_blocks"]["conv2"]["kernel"].shape[0] == 5


def test_convnext_from_its_folder(convnext_weights, tmp_path):
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(convnext_weights, path)
  (tmp_path / "config.json").write_text(json.dumps({"architecture": "x"}))
  artifact = convert("convnext", str(tmp_path), str(tmp_path / "out"))
  assert artifact.kind == "convnext"
  assert artifact.metadata["model_config"] == {
    "depths": [1, 2, 3, 1],
    "dims": [4, 8, 12, 16],
  }
  assert "family" not in artifact.metadata["source"]
  project = artifact.params["stage2_blocks"]["project"]["kernel"]
  theirs = convnext_weights["stages.1.blocks.1.mlp.fc2.weight"]
  np.testing.assert_array_equal(project[1], theirs.T)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"layer3.4.bn2.bias": None, "layer3.4.bn2.beta": zeros(8)},
      r"SimCLR's ResNet of \[1, 2, 6, 1\] bottlenecks: .* missing \(1\):"
      r" layer3.4.bn2.bias. unexpected \(1\): layer3.4.bn2.beta",
    ),
    ({"conv1.weight": None}, r"no convolution conv1\.weight, but .'bn1.bias'"),
    (
      {"bn1.running_var": np.full(4, -1.0)},
      "bn1.running_var holds -1.0, want >= 0",
    ),
  ],
)
def test_other_resnets_are_refused(resnet_weights, change, message):
  changed = resnet_weights | change
  changed = {k: v for k, v in changed.items() if v is not None}
  with pytest.raises(WeightsError, match=message):
    resnet.convert_simclr(changed, None)


def test_moco_has_nothing_unknown_beside_it(resnet_weights):
  state = moco_state(resnet_weights)
  state["module.predictor.weight"] = zeros(2)
  with pytest.raises(WeightsError, match=r"unexpected \(1\): module.predictor"):
    resnet.convert_moco(state, None)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"stages.1.blocks.1.mlp.grn.weight": None},
      r"as timm has it, of \[1, 2, 3, 1\] blocks: .* missing \(1\):"
      r" stages.1.blocks.1.mlp.grn.weight",
    ),
    # ConvNeXt of 2022 scales each block's result.
    ({"stages.0.blocks.0.gamma": zeros(2)}, "unexpected .*blocks.0.gam"),
    (
      {"stem.0.weight": None},
      r"none of .*'stem.0.weight'.*but there are .'head.fc.bias'",
    ),
    ({"downsample_layers.0.0.weight": zeros(1)}, "ConvNeXt-V2 has it"),
  ],
)
def test_other_convnexts_are_refused(convnext_weights, change, message):
  changed = convnext_weights | change
  changed = {k: v for k, v in changed.items() if v is not None}
  with pytest.raises(WeightsError, match=message):
    convnext.convert_convnext(changed, None)

"""W-Flow's checkpoints as generators: names, averages, and what is refused."""

import hashlib
import re
import sys

import jax
import numpy as np
import pytest
from flax import traverse_util

from configs import models
from drift_jax.models import release
from drift_jax.models.generator import build_generator
from drift_jax.system import hub, sharding
from drift_jax.tasks.generator.restore import open_generator
from drift_jax.tools import convert_weights
from drift_jax.training import artifacts
from drift_jax.training.conversions import published, wflow
from drift_jax.training.conversions.convert import convert
from drift_jax.training.conversions.layouts import WeightsError
from tests.autoencoders import save_vae
from tests.builders import random_like
from tests.tools.published import Tensor, as_tensors, fake_torch

# Two blocks' and tables' numbers have two digits.
TINY = published.WFlowSize("checkpoints/tiny/state_00000007.pt", 24, 11, 3)
# The release's names as W-Flow's, one substitution after the other.
RULES = (
  (r"^Embed_0/embedding", "class_embed.weight"),
  (r"^noise_embeds_(\d+)/embedding", r"noise_embeds.\1.weight"),
  (r"^TimestepEmbedder_0/TorchLinear_0", "cfg_embedder.fc1"),
  (r"^TimestepEmbedder_0/TorchLinear_1", "cfg_embedder.fc2"),
  (r"^RMSNorm_0", "cfg_norm"),
  (r"^LightningDiT_0/TorchLinear_0", "model.patch_embed"),
  (r"^LightningDiT_0/TorchLinear_1", "model.c_token_proj"),
  (r"^LightningDiT_0/FinalLayer_0/RMSNorm_0", "model.final_layer.norm_final"),
  (
    r"^LightningDiT_0/FinalLayer_0/TorchLinear_0",
    "model.final_layer.adaLN_mod.1",
  ),
  (r"^LightningDiT_0/FinalLayer_0/TorchLinear_1", "model.final_layer.linear"),
  (r"^LightningDiT_0/blocks_(\d+)", r"model.blocks.\1"),
  (r"^LightningDiT_0/", "model."),
  (r"/RMSNorm_0", ".norm1"),
  (r"/RMSNorm_1", ".norm2"),
  (r"/Attention_0/TorchLinear_0", ".attn.qkv"),
  (r"/Attention_0/TorchLinear_1", ".attn.proj"),
  (r"/Attention_0", ".attn"),
  (r"/SwiGLUFFN_0/TorchLinear_0", ".mlp.w1"),
  (r"/SwiGLUFFN_0/TorchLinear_1", ".mlp.w3"),
  (r"/SwiGLUFFN_0/TorchLinear_2", ".mlp.w2"),
  (r"/TorchLinear_0", ".adaLN_mod.1"),
  (r"/Dense_0/kernel", ".linear.weight"),
  (r"/Dense_0/bias", ".linear.bias"),
  (r"/", "."),
)


def arguments():
  """The tiny generator's, as a preset's."""
  return models.generator_b2_latent().to_dict() | {
    "hidden_size": TINY.width,
    "cond_dim": TINY.width,
    "depth": TINY.depth,
    "num_heads": TINY.num_heads,
    "remat": "none",
  }


def w_flow_state(kind_config, params):
  """Parameters here as W-Flow has them, by way of the release's names."""
  tree = release.to_release("gen", kind_config, params)
  state = {}
  for name, array in traverse_util.flatten_dict(tree, sep="/").items():
    array = np.asarray(array)
    array = array.T if name.endswith("/kernel") else array
    for pattern, replacement in RULES:
      name = re.sub(pattern, replacement, name)
    state[name] = array
  return state


@pytest.fixture(scope="module")
def params():
  model_config = release.published_config("gen", arguments())
  return random_like(release.describe("gen", model_config)[1], 0.2)


@pytest.fixture(scope="module")
def state(params):
  return w_flow_state(release.published_config("gen", arguments()), params)


@pytest.fixture
def file(tmp_path, monkeypatch):
  """A checkpoint's file; its contents come from the stand-in for torch."""
  monkeypatch.setitem(published.WFLOW_SIZES, "tiny", TINY)
  path = tmp_path / "source" / TINY.file
  path.parent.mkdir(parents=True)
  path.write_bytes(b"a zip of arrays")
  return path


def checkpoint(state, **changes):
  """What W-Flow saves; its last weights are others than their average."""
  last = {f"_orig_mod.{name}": -array for name, array in state.items()}
  content = {
    "step": 7,
    "model": as_tensors(last),
    "ema_model": as_tensors(state),
    "optimizer": {"state": {0: {"exp_avg": Tensor(np.ones(3))}}, "groups": [1]},
    "ema_decay": 0.999,
  } | changes
  return {key: value for key, value in content.items() if value is not ...}


def test_the_average_comes_through_bit_for_bit(
  file, params, state, tmp_path, monkeypatch
):
  fake_torch(monkeypatch, lambda _: checkpoint(state))
  monkeypatch.setattr(convert_weights.console, "setup", lambda: None)
  source, out = tmp_path / "source", tmp_path / "out"
  convert_weights.main(
    ["wflow", f"--source={source}", "--size=tiny", f"--out={out}"]
  )
  artifact = artifacts.load(out)
  jax.tree.map(np.testing.assert_array_equal, artifact.params, params)
  module = build_generator(**arguments())
  assert artifact.module == module
  draw = jax.jit(
    lambda params: module.apply(
      {"params": params},
      np.array([3, 999]),
      1.5,
      rngs={"noise": jax.random.key(1)},
    )
  )
  image = draw(params)
  assert np.std(image) > 0
  np.testing.assert_array_equal(draw(artifact.params), image)
  metadata = artifact.metadata
  assert (metadata["step"], metadata["ema_decay"]) == (7, 0.999)
  assert metadata["alpha_range"] == [1.0, 4.0]
  assert metadata["vae"] == "hf://stabilityai/sd-vae-ft-mse"
  assert metadata["source"] == {
    "location": str(source),
    "file": file.name,
    "revision": None,
    "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    "family": "wflow",
  }


def test_it_opens_as_any_generator(file, state, tmp_path, monkeypatch):
  fake_torch(monkeypatch, lambda _: checkpoint(state))
  convert("wflow", str(file), str(tmp_path / "out"), "tiny")
  vae = save_vae(tmp_path / "vae", latent_channels=4)
  opened = open_generator(
    str(tmp_path / "out"), sharding.make_mesh(), vae=str(vae)
  )
  assert (opened.step, opened.ema_decay) == (7, 0.999)
  assert opened.alpha_range == (1.0, 4.0)
  assert opened.class_names[207] == "golden retriever"
  assert opened.task.sample_shape == (32, 32, 4)


@pytest.mark.parametrize("size", [None, "tiny"])
def test_names_of_a_compiled_module_and_a_size_that_the_width_tells(
  file, params, state, tmp_path, monkeypatch, size
):
  prefixed = {f"_orig_mod.{name}": array for name, array in state.items()}
  content = checkpoint(state, ema_model=as_tensors(prefixed), model=...)
  fake_torch(monkeypatch, lambda _: content)
  artifact = convert("wflow", str(file), str(tmp_path / "out"), size)
  jax.tree.map(np.testing.assert_array_equal, artifact.params, params)


def test_facts_that_are_no_numbers_are_said_and_left_out(
  file, state, tmp_path, monkeypatch, caplog
):
  content = checkpoint(state, step="late", ema_decay=...)
  fake_torch(monkeypatch, lambda _: content)
  metadata = convert("wflow", str(file), str(tmp_path / "out")).metadata
  assert metadata["step"] is None and metadata["ema_decay"] is None
  (record,) = caplog.records
  assert "step='late'" in record.getMessage()


# Arrays and numbers of W-Flow's checkpoints, and the preset of each.
SIZES = {
  "ablation": (241, 132_708_880, models.generator_b2_latent),
  "b2": (241, 132_708_880, models.generator_b2_latent),
  "l2": (433, 462_909_456, models.generator_l2_latent),
  "xl2": (497, 678_929_872, models.generator_xl2_latent),
}


@pytest.mark.slow
def test_the_four_sizes_are_the_presets():
  assert SIZES.keys() == published.WFLOW_SIZES.keys()
  for size, (arrays, numbers, preset) in SIZES.items():
    values = preset().to_dict()
    if size == "ablation":
      values["attention_dtype"] = "float32"
    config = wflow.model_config_of(size)
    assert config == release.published_config("gen", values)
    shapes = release.parameter_shapes("gen", config)
    names = [
      n for entry in wflow.NAMES.entries(shapes).values() for n in entry.names
    ]
    assert len(names) == len(set(names)) == arrays
    assert sum(map(np.prod, shapes.values())) == numbers


QKV = "model.blocks.10.attn.qkv.linear.weight"


@pytest.mark.parametrize(
  ("change", "size", "message"),
  [
    (lambda s: {QKV: ...}, "tiny", rf"tiny: .*missing \(1\): {QKV}"),
    (
      lambda s: {"model.blocks.11.norm1.weight": s["cfg_norm.weight"]},
      "tiny",
      r"unexpected \(1\): model.blocks.11.norm1.weight",
    ),
    (
      lambda s: {QKV: s[QKV].T},
      "tiny",
      rf"{QKV} has shape \(24, 72\), not \(72, 24\)",
    ),
    (
      lambda s: {"class_embed.weight": s["class_embed.weight"].T},
      "tiny",
      r"class_embed.weight has shape \(24, 1000\), not \(1000, 24\)",
    ),
    (lambda s: {QKV: s[QKV] * np.nan}, "tiny", f"{QKV} holds values that are"),
    (lambda s: {QKV: s[QKV].astype(int)}, "tiny", f"{QKV} has dtype int64"),
    (lambda s: {"model.pos_embed": ...}, None, "no model.pos_embed, but .'cfg"),
    (lambda s: {}, "l2", "=l2 has width 1024, but .* has 24: that is --size=t"),
    (
      lambda s: {"model.pos_embed": np.zeros((1, 256, 768))},
      None,
      "has width 768: give --size=ablation or --size=b2, which",
    ),
    (
      lambda s: {"model.pos_embed": np.zeros((1, 256, 100))},
      None,
      "has width 100, W-Flow's are .*'xl2': 1152",
    ),
  ],
)
def test_other_weights_are_one_line_and_nothing_is_written(
  file, state, tmp_path, monkeypatch, change, size, message
):
  wrong = {k: v for k, v in (state | change(state)).items() if v is not ...}
  fake_torch(monkeypatch, lambda _: checkpoint(wrong))
  with pytest.raises(WeightsError, match=f"{file}: .*{message}") as caught:
    convert("wflow", str(file), str(tmp_path / "out"), size)
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "out").exists()


def test_the_last_weights_never_stand_in_for_the_average(
  file, state, tmp_path, monkeypatch
):
  alone = as_tensors(state)
  for content, message in (
    (
      checkpoint(state, ema_model=...),
      r"no 'ema_model', but \['step', 'model'",
    ),
    (alone, r"no 'ema_model', but \['cfg_"),
    ([alone], "no 'ema_model', but "),
    (checkpoint(state, ema_model={"a": 1}), "ema_model of .*no state dict"),
  ):
    fake_torch(monkeypatch, lambda _, content=content: content)
    with pytest.raises(WeightsError, match=message):
      convert("wflow", str(file), str(tmp_path / "out"), "tiny")


def test_what_is_missing_is_said_before_a_download(tmp_path, monkeypatch):
  def refuse(address):
    raise AssertionError(f"{address} was asked for")

  monkeypatch.setattr(hub, "fetch", refuse)
  monkeypatch.setitem(sys.modules, "torch", None)
  out = str(tmp_path / "out")
  with pytest.raises(WeightsError, match="needs torch, .*pip install torch"):
    convert("wflow", "hf://jiaqihan99/W-Flow", out, "l2")
  fake_torch(monkeypatch, lambda _: {})
  (tmp_path / "a.safetensors").touch()
  for source, message in (
    ("hf://jiaqihan99/W-Flow", "may hold several: name the file, or --size"),
    (str(tmp_path), "may hold several: name the file, or --size"),
    (str(tmp_path / "a.safetensors"), "is no torch checkpoint: want one of"),
  ):
    with pytest.raises(WeightsError, match=message):
      convert("wflow", source, out)

"""Published weights converted: layouts, places, and what is refused."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import sys

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from drift_jax.models import release
from drift_jax.tools import convert_weights
from drift_jax.training import artifacts
from drift_jax.training.conversions import (
  inception,
  published,
  vae,
  vit,
  weight_files,
)
from drift_jax.training.conversions.convert import convert
from drift_jax.training.conversions.layouts import (
  WeightsError,
  published_shapes,
)
from drift_jax.training.conversions.vae import convert_vae
from drift_jax.training.conversions.weight_files import read_weights
from tests.fake_hub import COMMIT, hub, serving
from tests.models.published import CLIP, DINOV2, draw_all
from tests.process import call
from tests.released_hub import in_flax
from tests.tools.published import as_tensors, fake_torch

FILE = "diffusion_pytorch_model.safetensors"
MODEL_CONFIG = {
  "in_channels": 3,
  "latent_channels": 2,
  "block_out_channels": [4, 8],
  "layers_per_block": 1,
  "norm_num_groups": 2,
  "scaling_factor": 0.13025,
}
CONFIG = MODEL_CONFIG | {
  "_class_name": "AutoencoderKL",
  "_diffusers_version": "0.42.1",
  "act_fn": "silu",
  "down_block_types": ["DownEncoderBlock2D"] * 2,
  "out_channels": 3,
  "sample_size": 8,
  "up_block_types": ["UpDecoderBlock2D"] * 2,
}


def draw(kind, model_config, entries_of):
  """Weights under the published names, in torch's layout.

  Whole numbers: float16 holds them exactly.
  """
  random = np.random.RandomState(0)
  shapes = release.parameter_shapes(kind, model_config)
  return {
    name: random.randint(1, 99, shape).astype(np.float32)
    for name, shape in published_shapes(entries_of(shapes), shapes).items()
  }


def sha256(path):
  return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def weights():
  """A small AutoencoderKL under diffusers' names."""
  return draw("vae", MODEL_CONFIG, vae.NAMES.entries)


@pytest.fixture
def folder(tmp_path, weights):
  """What diffusers' save_pretrained writes."""
  path = tmp_path / "there"
  path.mkdir()
  safetensors.numpy.save_file(weights, path / FILE)
  (path / "config.json").write_text(json.dumps(CONFIG))
  return path


def test_folder_file_and_pipeline_give_the_same_autoencoder(
  folder, tmp_path, weights
):
  artifact = convert("vae", str(folder), str(tmp_path / "a"))
  assert artifact.kind == "vae"
  assert artifact.metadata["model_config"] == MODEL_CONFIG
  assert artifact.module.scaling_factor == 0.13025
  assert artifact.metadata["source"] == {
    "location": str(folder),
    "file": FILE,
    "revision": None,
    "sha256": sha256(folder / FILE),
  }
  encoder = artifact.params["encoder"]
  kernel = encoder["level1_resample"]["kernel"]
  theirs = weights["encoder.down_blocks.0.downsamplers.0.conv.weight"]
  assert kernel[0, 2, 3, 1] == theirs[1, 3, 0, 2]
  query = encoder["middle_attention"]["query"]["kernel"]
  assert (
    query[3, 1] == weights["encoder.mid_block.attentions.0.to_q.weight"][1, 3]
  )
  again = convert("vae", str(folder / FILE), str(tmp_path / "b"))
  assert again.sha256 == artifact.sha256
  # A pipeline's folder has it in vae.
  (tmp_path / "pipeline").mkdir()
  folder.rename(tmp_path / "pipeline" / "vae")
  again = convert("vae", str(tmp_path / "pipeline"), str(tmp_path / "c"))
  assert again.sha256 == artifact.sha256


def older(weights):
  """The layout of before diffusers 0.17: other names, 1x1 convolutions."""
  names = {"to_q": "query", "to_k": "key", "to_v": "value"}
  result = {}
  for name, array in weights.items():
    for new, old in (names | {"to_out.0": "proj_attn"}).items():
      if f".{new}." in name:
        name = name.replace(f".{new}.", f".{old}.")
        array = array[:, :, None, None] if array.ndim == 2 else array
    result[name] = array
  return result


def test_the_flax_form_is_the_same_autoencoder(folder, tmp_path, weights):
  """As FlaxAutoencoderKL writes it: names with _0, kernels HWIO and [I, O]."""
  expected = convert_vae(weights, CONFIG).params
  (folder / FILE).unlink()
  path = folder / "diffusion_flax_model.msgpack"
  data = flax.serialization.msgpack_serialize(in_flax(weights))
  path.write_bytes(data)
  config = CONFIG | {"_class_name": "FlaxAutoencoderKL"}
  (folder / "config.json").write_text(json.dumps(config))
  artifact = convert("vae", str(folder), str(tmp_path / "out"))
  jax.tree.map(np.testing.assert_array_equal, artifact.params, expected)
  for broken, message in (
    (data[:-100], "no complete msgpack"),
    (b"", "no complete msgpack"),
    (flax.serialization.msgpack_serialize({"a": 1}), "a is 1, want an array"),
    (flax.serialization.msgpack_serialize({"a": {}}), "not the weights"),
  ):
    path.write_bytes(broken)
    with pytest.raises(WeightsError, match=message):
      convert("vae", str(folder), str(tmp_path / "out"))


def cast(dtype):
  return lambda weights: {k: v.astype(dtype) for k, v in weights.items()}


@pytest.mark.parametrize(
  "change",
  [older, cast(np.float16), cast(ml_dtypes.bfloat16), cast(np.float64)],
)
def test_other_layouts_and_precisions_give_the_same_parameters(
  weights, tmp_path, change
):
  expected = convert_vae(weights, CONFIG).params
  safetensors.numpy.save_file(change(weights), tmp_path / FILE)
  read = read_weights(tmp_path / FILE)
  params = convert_vae(read, CONFIG).params
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
    np.dtype(np.float32)
  }


def test_other_weights_are_listed_and_nothing_is_written(
  folder, tmp_path, weights
):
  wrong = dict(weights)
  del wrong["quant_conv.bias"]
  wrong["quant_conv.scale"] = np.zeros(3, np.float32)
  wrong["decoder.conv_in.weight"] = np.zeros((8, 2, 3, 1), np.float32)
  safetensors.numpy.save_file(wrong, folder / FILE)
  with pytest.raises(
    WeightsError,
    match=(
      r"missing \(1\): quant_conv.bias. unexpected \(1\): quant_conv.scale. "
      r"wrong shapes \(1\): decoder.conv_in.weight has shape \(8, 2, 3, 1\), "
      r"not \(8, 2, 3, 3\)"
    ),
  ):
    convert("vae", str(folder), str(tmp_path / "out"))
  assert not (tmp_path / "out").exists()


def test_values_that_are_no_weights(weights):
  name = "encoder.conv_in.bias"
  for values, message in (
    (np.zeros(4, np.int32), "has dtype int32, want floating point"),
    (np.full(4, np.nan, np.float32), "holds values that are not finite"),
  ):
    with pytest.raises(WeightsError, match=f"{name} {message}"):
      convert_vae(weights | {name: values}, CONFIG)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"_class_name": "VQModel"}, "_class_name='VQModel', but only 'AutoenCo"),
    ({"shift_factor": 0.06}, "shift_factor=0.06, but only None can be conv"),
    ({"out_channels": 4}, "out_channels=4, but only 3 can be converted"),
    ({"up_block_types": ["Attn"]}, "up_block_types=.'Attn'., but only .'UpDe"),
    ({"scaling_factor": None}, "scaling_factor=None, want a value like 0.18"),
    ({"scaling_factor": -1.0}, "scaling_factor=-1.0: must be positive"),
    ({"norm_num_groups": 3}, "=4 must be a multiple of norm_groups=3"),
  ],
)
def test_other_architectures_are_refused(weights, change, message):
  with pytest.raises(WeightsError, match=f"(?i)config.json.*{message}"):
    convert_vae(weights, CONFIG | change)


class Trap:
  """Writes a file when it is unpickled."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def __reduce__(self):
    return (pathlib.Path.touch, (self.path,))


def test_pickle_under_another_name_is_not_executed(tmp_path):
  import pickle

  trap = pickle.dumps({"encoder.conv_in.weight": Trap(tmp_path / "sprung")})
  (tmp_path / FILE).write_bytes(trap)
  with pytest.raises(
    WeightsError, match=r"beginning with b'\\x80.*no complete safetensors file"
  ):
    convert("vae", str(tmp_path), str(tmp_path / "out"))
  assert not (tmp_path / "sprung").exists()


def test_truncated_weights(folder, tmp_path):
  data = (folder / FILE).read_bytes()
  for kept in (0, 5, 100, -1):
    (folder / FILE).write_bytes(data[:kept])
    with pytest.raises(WeightsError, match=r"\d+ bytes, .*no complete safete"):
      read_weights(folder / FILE)


def test_unreadable_config(folder, tmp_path):
  for content, message in ((b"{", "is no JSON"), (b"[1]", "want a dict")):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(WeightsError, match=rf"config\.json.*{message}"):
      convert("vae", str(folder), str(tmp_path / "out"))


def test_published_name_with_other_contents_is_damaged(tmp_path):
  path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
  path.write_bytes(b"half of it")
  damaged = r"\(10 bytes\) has SHA-256 .* begins with 6726825d"
  with pytest.raises(WeightsError, match=damaged):
    convert("inception", str(path), str(tmp_path / "out"))


def test_nothing_there(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  (tmp_path / "empty").mkdir()
  for name in ("weights.npz", "vae.bin"):
    (tmp_path / name).touch()
  for source, message in (
    ("nowhere", "there is no file or folder nowhere"),
    (str(tmp_path / "empty"), f"holds none of .'{FILE}', .*'vae/{FILE}'"),
    (str(tmp_path / "weights.npz"), "unknown suffix '.npz', valid options"),
    (str(tmp_path / "vae.bin"), "needs torch, .* not installed; take"),
    ("hf://owner", "want hf://OWNER/NAME"),
    ("https://127.0.0.1/a.safetensors", "only weights whose SHA-256 is known"),
  ):
    with pytest.raises(WeightsError, match=message):
      convert("vae", source, str(tmp_path / "out"))


def test_torch_file_loads_arrays_only(tmp_path, monkeypatch, weights):
  """The library is a stand-in; its arguments are what matters."""
  path = tmp_path / "vae.pt"
  path.touch()
  tensors = as_tensors(cast(ml_dtypes.bfloat16)(weights))
  for content in (tensors, {"state_dict": tensors}):
    fake_torch(monkeypatch, lambda _, content=content: content)
    jax.tree.map(np.testing.assert_array_equal, read_weights(path), weights)

  def fail(path):
    raise RuntimeError("no\nzip")

  for read, message in (
    (lambda _: [tensors], "no state dict"),
    (fail, r"arrays only \(RuntimeError\): it"),
  ):
    fake_torch(monkeypatch, read)
    with pytest.raises(WeightsError, match=message):
      read_weights(path)


TRY_EACH = """
import sys
from drift_jax.training.conversions import convert as convert_weights
for i, source in enumerate(sys.argv[2:]):
  try:
    convert_weights.convert("vae", source, f"{sys.argv[1]}/{i}")
    print("converted")
  except convert_weights.WeightsError as error:
    print(error)
"""


@pytest.mark.system
def test_hub_online_then_offline(folder, tmp_path):
  files = {path.name: path.read_bytes() for path in folder.iterdir()}
  repositories = {
    "owner/vae": files,
    "owner/pipeline": {f"vae/{name}": data for name, data in files.items()},
    "owner/bare": {FILE: files[FILE]},
    "owner/text": {"README.md": b""},
  }
  cache = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
  pinned = f"hf://owner/pipeline@{COMMIT}/vae/{FILE}"

  def check(place, expected, **environment):
    run = call("-c", TRY_EACH, place, *expected, **environment, **cache)
    lines = run.stdout.splitlines()
    assert len(lines) == len(expected), run.stderr
    for line, words in zip(lines, expected.values(), strict=True):
      assert all(word in line for word in words), line

  # No config.json there: taken for Stable Diffusion's, which it isn't.
  bare = {"hf://owner/bare": ("hf://owner/bare: ", "not the weights")}
  with hub(repositories) as address:
    check(
      tmp_path / "online",
      {
        "hf://owner/vae": ["converted"],
        pinned: ["converted"],
        "hf://owner/pipeline/vae": ["converted"],
        **bare,
        "hf://owner/text": [f"the repository holds none of ['{FILE}'"],
        "hf://owner/nothing": ["hf://owner/nothing", "404"],
        "hf://owner/vae@v2": ["hf://owner/vae@v2", "404"],
      },
      HF_ENDPOINT=address,
    )
  first, second = (artifacts.load(tmp_path / "online" / str(i)) for i in (0, 1))
  assert first.sha256 == second.sha256
  assert first.metadata["source"] == {
    "location": "hf://owner/vae",
    "file": FILE,
    "revision": COMMIT,
    "sha256": hashlib.sha256(files[FILE]).hexdigest(),
  }
  assert second.metadata["source"]["revision"] == COMMIT
  assert first.metadata["model_config"] == MODEL_CONFIG
  check(
    tmp_path / "offline",
    {
      "hf://owner/vae": ["converted"],
      **bare,
      "hf://owner/unseen": [f"hf://owner/unseen: {FILE}: "],
    },
    HF_HUB_OFFLINE="1",
  )


@pytest.mark.system
def test_command_line(folder, tmp_path):
  """One line on standard error, whether it went well or not."""
  command = ("-m", "drift_jax.tools.convert_weights", "vae")
  done = call(*command, f"--source={folder}", f"--out={tmp_path / 'out'}")
  assert done.returncode == 0 and done.stdout == "", done
  assert done.stderr.count("\n") == 1
  artifact = artifacts.load(tmp_path / "out")
  assert f"SHA-256 {artifact.sha256}" in done.stderr
  assert "'scaling_factor': 0.13025" in done.stderr


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["vea"], "invalid choice: 'vea' (choose from"),
    (["vae", "--source=x"], "the following arguments are required: --out"),
    (["vae", "--source=nowhere", "--out=y"], "no file or folder nowhere"),
    (["vae", "--source={folder}", "--out={file}"], "{file}"),
  ],
)
def test_mistakes_on_the_command_line_are_one_line(
  folder, tmp_path, arguments, message, monkeypatch
):
  monkeypatch.setattr(convert_weights.console, "setup", lambda: None)
  places = {"folder": folder, "file": tmp_path / "file"}
  places["file"].touch()
  with pytest.raises(SystemExit) as exit_info:
    convert_weights.main([x.format(**places) for x in arguments])
  text = exit_info.value.code
  assert isinstance(text, str) and text.startswith("Error: ")
  assert message.format(**places) in text and "\n" not in text


@pytest.fixture
def inception_weights(monkeypatch):
  """A narrow Inception-v3; inception_test converts the whole one."""
  model_config = {"width": 1, "num_classes": 4}
  monkeypatch.setattr(inception, "MODEL_CONFIG", model_config)
  return draw("inception", model_config, inception.entries)


def test_inception_that_is_not_the_published_file_says_so(
  inception_weights, tmp_path, caplog
):
  name = "pt_inception-2015-12-05-6726825d.safetensors"
  safetensors.numpy.save_file(inception_weights, tmp_path / name)
  artifact = convert("inception", str(tmp_path), str(tmp_path / "out"))
  assert artifact.kind == "inception"
  assert artifact.module.width == 1
  assert artifact.metadata["source"] == {
    "location": str(tmp_path),
    "file": name,
    "revision": None,
    "sha256": sha256(tmp_path / name),
    "published": False,
  }
  (record,) = caplog.records
  assert "is not the published file" in record.getMessage()
  with pytest.raises(artifacts.ArtifactError, match="use_bf16=True, but only"):
    artifacts.load(tmp_path / "out", dtype="bfloat16")


@contextlib.contextmanager
def site(replies):
  """A web site on this machine: (status, body, its length if not 0) each."""

  def answer(handler):
    status, body, length = replies.pop(0)
    handler.send_response(status)
    if length:
      handler.send_header("Content-Length", str(length))
    handler.end_headers()
    handler.wfile.write(body)

  handler = type(
    "Handler",
    (http.server.BaseHTTPRequestHandler,),
    {"do_GET": answer, "log_message": lambda *_: None},
  )
  with serving(handler) as address:
    yield address


def test_published_inception_is_told_by_its_checksum(
  inception_weights, tmp_path, monkeypatch
):
  """Downloaded without a source, read with torch: both are stand-ins."""
  body = b"zip of arrays"
  digest = hashlib.sha256(body).hexdigest()
  name = f"pt_inception-2015-12-05-{digest[:8]}.pth"
  fake_torch(monkeypatch, lambda _: as_tensors(inception_weights))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  monkeypatch.setattr(convert_weights.console, "setup", lambda: None)
  model = published.MODELS["inception"]
  assert model.url.endswith(f"-{model.sha256[:8]}.pth")
  with site([(200, body, len(body))]) as address:
    url = f"{address}/releases/{name}"
    model = model._replace(url=url, sha256=digest)
    monkeypatch.setitem(published.MODELS, "inception", model)
    convert_weights.main(["inception", f"--out={tmp_path / 'out'}"])
  assert (tmp_path / "cache" / "drift_jax" / name).read_bytes() == body
  artifact = artifacts.load(tmp_path / "out")
  assert artifact.metadata["source"] == {
    "location": url,
    "file": name,
    "revision": None,
    "sha256": digest,
    "published": True,
  }


def test_download_keeps_only_what_has_the_checksum(tmp_path, monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  good = b"good" * 1000
  digest = hashlib.sha256(good).hexdigest()
  replies = [(404, b"", 0), (200, good, 4001), (200, b"bad", 3), (200, good, 0)]

  cache = tmp_path / "cache"
  with site(replies) as address:
    url = f"{address}/a/w.pth?raw=true"
    for message in (
      "404",
      "ended after 4000 of 4001 bytes; try again",
      f"3 bytes with SHA-256 .*, not the published file's {digest}",
    ):
      with pytest.raises(WeightsError, match=f"w.pth.*{message}"):
        weight_files.download(url, digest, cache)
      assert not list(cache.iterdir())
    path = weight_files.download(url, digest, cache)
    assert path == cache / "w.pth" and path.read_bytes() == good
    assert weight_files.download(url, digest, cache) == path and not replies
    # What is damaged later is fetched again.
    path.write_bytes(good[:-1])
    replies.append((200, good, len(good)))
    weight_files.download(url, digest, cache)
    assert path.read_bytes() == good and not replies
  path.unlink()
  with pytest.raises(WeightsError, match="refused.*give its path"):
    weight_files.download(url, digest, cache)


CLIP_CONFIG = {
  "model_type": "clip",
  "projection_dim": 20,
  "text_config": {"hidden_size": 16},
  "vision_config": CLIP | {"projection_dim": 512},
}
CLIP_MODEL_CONFIG = vit.clip_config(CLIP_CONFIG)
QUERY = "vision_model.encoder.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def dinov2_weights(golden):
  return draw_all(golden("vit")["parameters_dinov2"])


@pytest.fixture
def clip_weights(golden):
  """With the ends of the text half."""
  return draw_all(golden("vit")["parameters_clip"]) | {
    "logit_scale": np.ones((), np.float32),
    "text_model.embeddings.position_ids": np.arange(77)[None],
    "text_projection.weight": np.zeros((5, 16), np.float32),
    "vision_model.embeddings.position_ids": np.arange(5)[None],
  }


def test_dinov2_from_its_folder(dinov2_weights, tmp_path, caplog):
  source = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(dinov2_weights, source)
  with pytest.raises(WeightsError, match=r"there is no config\.json beside"):
    convert("dinov2", str(tmp_path), str(tmp_path / "out"))
  (tmp_path / "config.json").write_text(json.dumps(DINOV2))
  artifact = convert("dinov2", str(tmp_path), str(tmp_path / "out"))
  assert not caplog.records
  assert artifact.kind == "vit"
  assert artifact.metadata["model_config"] == vit.dinov2_config(DINOV2)
  assert artifact.metadata["source"] == {
    "location": str(tmp_path),
    "file": "model.safetensors",
    "revision": None,
    "sha256": sha256(source),
    "family": "dinov2",
  }
  params = artifact.params
  attention = params["blocks"]["attention"]
  prefix = "encoder.layer.1.attention"
  np.testing.assert_array_equal(
    attention["key"]["kernel"][1],
    dinov2_weights[f"{prefix}.attention.key.weight"].T,
  )
  theirs = dinov2_weights["embeddings.patch_embeddings.projection.weight"]
  assert params["patch_embed"]["kernel"][3, 5, 2, 7] == theirs[7, 2, 3, 5]
  positions = dinov2_weights["embeddings.position_embeddings"][0]
  np.testing.assert_array_equal(
    params["position_embedding"], vit.resize_positions(positions, 16)
  )


def test_clip_from_its_folder(clip_weights, tmp_path):
  safetensors.numpy.save_file(clip_weights, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps(CLIP_CONFIG))
  artifact = convert("clip", str(tmp_path), str(tmp_path / "out"))
  assert artifact.kind == "vit"
  assert artifact.metadata["model_config"] == CLIP_MODEL_CONFIG
  assert artifact.metadata["source"]["family"] == "clip"
  query = artifact.params["blocks"]["attention"]["query"]["kernel"]
  np.testing.assert_array_equal(query[1], clip_weights[QUERY].T)
  for ours, theirs in (
    (artifact.params["class_token"], "class_embedding"),
    (artifact.params["position_embedding"], "position_embedding.weight"),
  ):
    theirs = clip_weights[f"vision_model.embeddings.{theirs}"]
    np.testing.assert_array_equal(ours, theirs)


def test_clips_image_half_comes_in_other_forms(clip_weights):
  whole = vit.convert_clip(clip_weights, CLIP_CONFIG)
  early = CLIP_CONFIG | {
    "vision_config": None,
    "vision_config_dict": CLIP,
  }
  half = {k: v for k, v in clip_weights.items() if k.startswith("vis")}
  bare = {k: v for k, v in half.items() if not k.startswith("visual")}
  unprefixed = {k.removeprefix("vision_model."): v for k, v in bare.items()}
  for weights, config, projection_dim in (
    (clip_weights, early, 20),
    (half, CLIP, 20),
    (bare, CLIP, 0),
    (unprefixed, CLIP, 0),
  ):
    converted = vit.convert_clip(weights, config)
    assert converted.model_config == CLIP_MODEL_CONFIG | {
      "projection_dim": projection_dim
    }
    expected = dict(whole.params)
    if not projection_dim:
      del expected["projection"]
    jax.tree.map(np.testing.assert_array_equal, converted.params, expected)


@pytest.mark.parametrize(
  ("model", "change", "message"),
  [
    ("dinov2", {"use_swiglu_ffn": True}, "use_swiglu_ffn=True: .*giant.*-lar"),
    (
      "dinov2",
      {"model_type": "dinov2_with_registers"},
      "only 'dinov2' can.*re",
    ),
    ("dinov2", {"qkv_bias": False}, "qkv_bias=False, but only True can be co"),
    ("dinov2", {"patch_size": None}, "patch_size=None, want a positive int"),
    (
      "dinov2",
      {"patch_size": 100},
      "=224 must be a multiple of patch_size=100",
    ),
    ("dinov2", {"hidden_size": ...}, "has no hidden_size, want"),
    (
      "clip",
      {"model_type": "siglip"},
      "only 'clip' or 'clip_vision_model' can",
    ),
    ("clip", {"vision_config": [1]}, r"vision_config=\[1\], want a dict"),
    ("clip", {"projection_dim": None}, "projection_dim=None, want a positive"),
    (
      "clip",
      {"vision_config": CLIP | {"hidden_act": "relu"}},
      "activation='relu': must be one of 'gelu', 'quick_gelu'",
    ),
  ],
)
def test_other_vit_architectures_are_refused(
  dinov2_weights, clip_weights, model, change, message
):
  function, weights, config = {
    "dinov2": (vit.convert_dinov2, dinov2_weights, DINOV2),
    "clip": (vit.convert_clip, clip_weights, CLIP_CONFIG),
  }[model]
  config = {k: v for k, v in (config | change).items() if v is not ...}
  with pytest.raises(WeightsError, match=f"config.json.*{message}"):
    function(weights, config)


def test_other_vit_weights_are_listed(dinov2_weights):
  positions = "embeddings.position_embeddings"
  for change, message in (
    (
      {"embeddings.register_tokens": np.zeros((1, 4, 8))},
      r"DINOv2 of config.json: .*unexpected \(1\): embeddings.register_tokens",
    ),
    (
      {positions: np.zeros((1, 5, 24))},
      rf"{positions} has shape \(1, 5, 24\), not \(1, 1370, 24\)",
    ),
    (
      {positions: np.full((1, 1370, 24), np.nan)},
      f"{positions} holds values that are not finite",
    ),
  ):
    with pytest.raises(WeightsError, match=message):
      vit.convert_dinov2(dinov2_weights | change, DINOV2)


def test_what_takes_defaults_says_so(tmp_path, monkeypatch, weights, caplog):
  """An AutoencoderKL without config.json, were it Stable Diffusion's."""
  monkeypatch.setattr(
    vae, "_CONFIG", {key: CONFIG[key] for key in MODEL_CONFIG}
  )
  safetensors.numpy.save_file(weights, tmp_path / FILE)
  artifact = convert("vae", str(tmp_path), str(tmp_path / "out"))
  assert artifact.metadata["model_config"] == MODEL_CONFIG
  (record,) = caplog.records
  assert "no config.json, took its defaults" in record.getMessage()

"""Exports on a hub of this machine: pushed, interrupted, refused, loaded."""

import functools
import json
import pathlib
import re

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from drift_jax.config import ConfigError
from drift_jax.tools import export as command
from drift_jax.tools.work import export, push
from tests.autoencoders import save_vae
from tests.conftest import GOLDEN
from tests.fake_hub import COMMIT, TOKEN, hub
from tests.process import call
from tests.small_generator import save_run

# Of huggingface_hub's own way to send a file without Xet.
pytestmark = pytest.mark.filterwarnings(
  "ignore:Use 'content=<...>':DeprecationWarning"
)

# Draws from each of some sources, and prints the images' checksum.
SAMPLE = """
import hashlib, sys
import drift_jax
for source in sys.argv[1:]:
  images = drift_jax.load(source).sample([3, 1], count=2, alpha=1.5).images
  print(hashlib.sha256(images.tobytes()).hexdigest())
"""
FIGURES = {"eval/fd_pixel/alpha_1.0": 3.25, "eval/fd_pixel/baseline": 1.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run whose only checkpoint, of step 1, has been judged."""
  workdir = tmp_path_factory.mktemp("runs") / "digits"
  save_run(workdir)
  records = [{"step": 1, **FIGURES}, {"step": 2, "eval/fd_pixel/alpha_1.0": 9}]
  lines = "".join(f"{json.dumps(record)}\n" for record in records)
  (workdir / "metrics.jsonl").write_text(lines)
  return str(workdir)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
  out = tmp_path_factory.mktemp("exports") / "digits"
  export.export(run, str(out), platforms=("cpu",))
  return out


@pytest.fixture
def on(monkeypatch):
  """Makes the hub's library work with an address, without its Xet."""

  def use(address):
    api = functools.partial(huggingface_hub.HfApi, endpoint=address)
    monkeypatch.setattr(push.huggingface_hub, "HfApi", api)

  monkeypatch.setenv("HF_TOKEN", TOKEN)
  monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
  return use


def files_of(folder):
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


@pytest.mark.system
def test_a_run_is_pushed_and_loaded_from_the_hub(run, tmp_path, on):
  """After an attempt that ended early; then from the cache, offline."""
  out, repositories, private = tmp_path / "out", {}, set()
  flags = [f"--out={out}", "--push=me/digits", "--private", "--platforms=cpu"]
  with hub(repositories, private=private) as address:  # refuses large files
    on(address)
    with pytest.raises(SystemExit, match="--push=me/digits: .*403"):
      command.main([f"--workdir={run}", *flags])
  assert repositories == {"me/digits": {}} and private == {"me/digits"}
  (out / push.CARD).write_text((out / push.CARD).read_text() + "Mine.\n")
  cache = {"HF_HOME": str(tmp_path / "cache")}
  # One of latents, with two copies of its weights.
  latents = str(tmp_path / "latents")
  export.export(
    *(str(GOLDEN / "artifact_gen"), latents),
    vae=str(save_vae(tmp_path / "vae", latent_channels=4)),
    formats=("release",),
  )
  repositories["me/latents"] = files_of(pathlib.Path(latents))
  uploads = {}
  with hub(repositories, private=private, uploads=uploads) as address:
    on(address)
    command.main(flags)
    assert repositories["me/digits"] == files_of(out) and uploads
    assert repositories["me/digits"][push.CARD].endswith(b"Mine.\n")
    sources = [str(out), "hf://me/digits", f"hf://me/digits@{COMMIT}"]
    sources += [latents, "hf://me/latents"]
    done = call("-c", SAMPLE, *sources, HF_ENDPOINT=address, **cache)
  assert done.returncode == 0, done.stderr[-3000:]
  here, *there, latents_here, latents_there = done.stdout.split()
  assert there == [here, here] and latents_here == latents_there != here
  again = sources[1], sources[4]
  offline = call("-c", SAMPLE, *again, HF_HUB_OFFLINE="1", **cache)
  assert offline.stdout.split() == [here, latents_here], offline.stderr


def test_the_card_says_what_it_is(exported, tmp_path, on):
  with hub({}, uploads={}) as address:
    on(address)
    push.push(str(exported), "me/digits", private=False, license="mit")
  card = (exported / push.CARD).read_text()
  header = re.fullmatch(r"---\n(.*?)---\n.*", card, re.DOTALL)[1]
  assert "library_name: drift_jax\nlicense: mit\n" in header
  # Of the exported step, and not of the last one.
  assert "| fd_pixel/alpha_1 | 3.25 | 1.5 |" in card
  assert 'drift_jax.load("hf://me/digits")' in card
  for name in re.findall(r"\]\(([\w.]+)\)", card):
    assert (exported / name).exists()
  with Image.open(exported / push.GRID) as image:
    assert np.asarray(image).std() > 20
  config = json.loads((exported / "run_config.json").read_text())
  assert config["task"] == "generator"


def test_what_is_refused(exported, tmp_path, on, monkeypatch):
  """In one line each; other people's files stay."""
  theirs = {"me/theirs": {"model.bin": b"1"}, "me/public": {}}
  with hub(theirs, uploads={}) as address:
    on(address)
    for repository, is_private, message in (
      ("digits", False, "want OWNER/NAME"),
      ("others/digits", False, "--push=others/digits: .*403"),
      ("me/theirs", False, r"holds something else \(model.bin\)"),
      ("me/public", True, "is there and is public"),
    ):
      with pytest.raises(ConfigError, match=message) as caught:
        push.push(
          str(exported), repository, private=is_private, license="unknown"
        )
      assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
  assert theirs == {"me/theirs": {"model.bin": b"1"}, "me/public": {}}
  monkeypatch.setattr(push.huggingface_hub, "get_token", lambda: None)
  with pytest.raises(ConfigError, match="needs a token"):
    push.check("me/digits")
  with pytest.raises(ConfigError, match="is no export"):
    push.check_export(str(tmp_path), "")
  with pytest.raises(ConfigError, match="is there already, as the export of"):
    push.check_export(str(exported), "runs/other")
  with pytest.raises(SystemExit, match="required: --from"):
    command.main([f"--out={tmp_path / 'new'}", "--push=me/digits"])

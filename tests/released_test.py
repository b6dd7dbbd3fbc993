"""Released weights from a hub, as people ask for them; offline afterwards."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from drift_jax.training import artifacts, released
from tests.conftest import ROOT
from tests.fake_hub import COMMIT, hub
from tests.judges import save_inception, save_random_statistics
from tests.process import call, process_environment
from tests.released_hub import (
  GENERATOR,
  WEIGHTS,
  artifact_files,
  autoencoder_files,
  repositories,
)

PAGE = (ROOT / "docs" / "sampling.md").read_text()
# Prints what each expression is, or the error that ends a program.
TRY = """if True:
  import sys

  import drift_jax
  from drift_jax.system.errors import ERRORS
  from drift_jax.training import artifacts, autoencoders

  for code in sys.argv[1:]:
    try:
      print(eval(code))
    except ERRORS as error:
      print("Error:", error)
"""


def caches(folder):
  """Variables that put all caches below a folder."""
  return {
    "HF_HOME": str(folder / "hf"),
    "HF_HUB_DISABLE_XET": "1",
    "XDG_CACHE_HOME": "",
  }


def try_each(folder, *codes, **variables):
  """What `TRY` prints, a line for each; the caches are below `folder`."""
  done = call(
    *("-c", TRY, *codes),
    **(caches(folder) | variables),
  )
  lines = done.stdout.splitlines()
  assert len(lines) == len(codes), done.stderr
  return lines


def documented():
  """Commands of the page that are about the hub: lists of arguments."""
  blocks = re.findall(r"```(python|bash)\n(.*?)```", PAGE, re.DOTALL)
  commands = []
  for language, text in blocks:
    if language == "python" and "hf://" in text:
      commands.append(["python", "-c", text])
    elif language == "bash":
      lines = re.sub(r"\\\n *", "", text).splitlines()
      commands += [
        shlex.split(line, comments=True)
        for line in lines
        if "hf://" in line or "verify_released" in line
        # Of a torch file: tools/convert_wflow_test.py.
        if "wflow" not in line
      ]
  return commands


def test_the_page_lists_what_is_released():
  """Names, sizes and figures are one fact."""
  rows = [
    [cell.strip(" `") for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if re.match(r"\| `hf://\w+` +\|", line)
  ]

  def text(value):
    return "" if value is None else str(value)

  assert rows[-len(released.released()) :] == [
    [
      f"hf://{entry.name}",
      entry.kind,
      entry.model,
      f"{entry.gigabytes:g} GB",
      text(entry.alpha),
      text(entry.fid),
    ]
    for entry in released.released()
  ]


@pytest.mark.parametrize(
  ("name", "golden", "arrays", "count"),
  [
    ("latent_L_sota", "gen_L2_latent", None, None),
    ("latent_B_sota", "gen_B2_latent", 241, 132_708_880),
    ("ablation", "gen_B2_latent", 241, 132_708_880),
    ("pixel_L_sota", "gen_L16_pixel", None, None),
    ("pixel_B_sota", "gen_B16_pixel", None, None),
    ("mae_latent_640", "mae_640_latent", None, None),
    ("mae_latent_256", "mae_256_latent", 155, 431_354_348),
    ("mae_pixel_640", "mae_640_pixel", None, None),
  ],
)
def test_sizes_are_those_of_the_published_models(name, golden, arrays, count):
  """4 bytes a parameter; release_test.py has the parameters themselves."""
  (entry,) = (x for x in released.released() if x.name == name)
  shapes = json.loads((ROOT / f"tests/golden/shapes_{golden}.json").read_text())
  assert shapes["n_params"] * 4e-9 == pytest.approx(entry.gigabytes, rel=0.01)
  assert arrays in (None, len(shapes["leaves"]))
  assert count in (None, shapes["n_params"])


@pytest.fixture(scope="module")
def theirs():
  return repositories()


@pytest.fixture(scope="module")
def cache(theirs, tmp_path_factory):
  """A folder of caches into which all documented commands have downloaded."""
  folder = tmp_path_factory.mktemp("released")
  save_inception(folder / "weights" / "inception", published=True)
  save_random_statistics(
    folder / "imagenet_256_fid_stats.npz",
    folder / "weights" / "inception",
    resolution=8,
    crop="center",
  )
  downloads = []
  with hub(theirs, downloads=downloads) as address:
    for command in documented():
      run_documented(command, folder, HF_ENDPOINT=address)
  assert downloads and len(downloads) == len(set(downloads))
  return folder


def run_documented(command, folder, **variables):
  """Runs a command of the page in a folder, on fewer samples."""
  command = [*command]
  if "--fid" in command:
    command.append("--num_samples=1000")
  if "drift_jax.main" in command:
    return  # needs the ImageNet: see training/init_from_test.py
  assert command[0] == "python"
  done = subprocess.run(
    [sys.executable, *command[1:]],
    cwd=folder,
    env=process_environment() | caches(folder) | variables,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, (command, done.stderr)


@pytest.mark.system
def test_documented_commands_draw(cache):
  pictures = {path.name for path in cache.rglob("*.png")}
  assert {"dogs_and_fish.png", "dogs.png", "latent_L_sota.png"} <= pictures
  for entry in released.released():
    if entry.kind == "gen":
      with Image.open(cache / "released" / f"{entry.name}.png") as picture:
        assert np.asarray(picture).std() > 1
  report = json.loads((cache / "released" / "latent_B_sota.json").read_text())
  assert report["num_samples"] == 1000 and report["step"] == 30000
  assert report["results"]["1.1"]["fid"] > 0
  assert report["vae"] == released.AUTOENCODER


@pytest.mark.system
def test_afterwards_no_hub_is_needed(cache):
  for command in documented():
    if "--fid" not in command:
      run_documented(command, cache, HF_HUB_OFFLINE="1")
  source = "drift_jax.load('hf://latent_L_sota')"
  facts, kept, unseen = try_each(
    cache,
    f"(lambda g: (g.step, g.ema_decay, g.vae.module.scaling_factor))"
    f"({source}.generator)",
    f"autoencoders.local('{released.AUTOENCODER}')",
    "drift_jax.load('hf://latent_S_sota')",
    HF_HUB_OFFLINE="1",
  )
  assert facts == "(30000, 0.999, 0.18215)"
  assert kept == str(
    cache
    / "drift_jax"
    / "autoencoders"
    / "stabilityai"
    / "sd-vae-ft-mse"
    / COMMIT
    / WEIGHTS
  )
  assert unseen.startswith("Error: hf://latent_S_sota: ")


@pytest.mark.system
def test_both_forms_are_one_autoencoder_and_no_temporary_stays(cache):
  folders = list((cache / "drift_jax" / "autoencoders").rglob("params_ema"))
  assert len(folders) == 2
  assert len({artifacts.load(folder).sha256 for folder in folders}) == 1
  assert not [path for path in cache.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.system
def test_an_interrupted_download_goes_on(theirs, tmp_path):
  """From the byte at which the connection ended."""
  name = "models/gen/jax/ablation/ema_params.msgpack"
  downloads = []
  with hub(theirs, cut=(name, WEIGHTS), downloads=downloads) as address:
    _, shape = try_each(
      tmp_path,
      # Bytes that are lost at most; files of tests have fewer.
      "setattr(drift_jax.system.hub.constants, 'DOWNLOAD_CHUNK_SIZE', 100)",
      "drift_jax.load('hf://ablation').image_shape",
      HF_ENDPOINT=address,
    )
  assert shape == "(8, 8, 3)"
  again = {file: first for _, file, first in downloads if first}
  assert again.keys() == {name, WEIGHTS}
  half = len(theirs[released.REPOSITORY][name]) // 2
  assert half - 100 <= again[name] <= half


@pytest.mark.system
def test_what_is_missing_is_said_before_the_large_file(theirs, tmp_path):
  """No autoencoder, none that fits, no space: nothing large is downloaded."""
  large = "models/gen/jax/latent_L_sota/ema_params.msgpack"
  own = artifact_files("gen", "unnamed", GENERATOR)
  for name, data in own.items():
    if name.endswith(".json"):
      metadata = json.loads(data)
      del metadata["artifact_type"]
      own[name] = json.dumps(metadata).encode()
  alone = {released.REPOSITORY: theirs[released.REPOSITORY]}
  others = {
    "a/own": own,
    "a/text": {"README.md": b""},
    "a/wide": autoencoder_files(latent_channels=8),
  }
  load = "drift_jax.load('hf://{}')".format
  cases = {
    (): {
      load("latent_L_sota"): "sd-vae-ft-mse",
      load("latent_L_sota', vae='hf://a/text"): "hf://a/text: a/text holds no",
      load("latent_L_sota', vae='hf://a/wide"): "of 8 channels, but the gen",
      load("a/own/models/gen/jax/unnamed"): "4 channels are the latents of",
      load("mae_latent_256"): "of kind 'mae', want 'gen'",
      load("latent_S_sota"): "latent_B_sota (B/2, latents, 0.53 GB, FID 1.74",
      load(""): "want hf://NAME",
    },
    (large,): {load("latent_L_sota"): "hf://latent_L_sota (1e+09 GB)"},
    (WEIGHTS,): dict.fromkeys(
      (load("latent_L_sota"), f"autoencoders.local('{released.AUTOENCODER}')"),
      "its conversion (1e+09 GB) do not fit",
    ),
  }
  for number, (claimed, expected) in enumerate(cases.items()):
    downloads = []
    there = (theirs if claimed else alone) | others
    sizes = dict.fromkeys(claimed, 10**18)
    with hub(there, claimed=sizes, downloads=downloads) as address:
      lines = try_each(tmp_path / str(number), *expected, HF_ENDPOINT=address)
    for line, words in zip(lines, expected.values(), strict=True):
      assert line.startswith("Error: ") and words in line, line
    small = {"config.json", "metadata.json"} | (
      {WEIGHTS} if not claimed else set()
    )
    assert {name.rpartition("/")[2] for _, name, _ in downloads} <= small


@pytest.mark.system
def test_a_cache_that_cannot_be_written(theirs, tmp_path):
  (tmp_path / "file").touch()
  with hub(theirs) as address:
    (line,) = try_each(
      tmp_path,
      "drift_jax.load('hf://ablation')",
      HF_ENDPOINT=address,
      XDG_CACHE_HOME=str(tmp_path / "file"),
    )
  assert re.match(r"Error: .*can't be kept: .*/file.*XDG_CACHE_HOME", line)


@pytest.mark.system
def test_processes_convert_one_autoencoder(theirs, tmp_path):
  """At the same time, after one that was killed."""
  left = tmp_path / "drift_jax" / "autoencoders" / "a" / ".left.tmp"
  left.mkdir(parents=True)
  (left / "weights").touch()
  code = f"autoencoders.local('{released.AUTOENCODER}')"
  with hub(theirs) as address:
    environment = process_environment() | {
      **caches(tmp_path),
      "HF_ENDPOINT": address,
    }
    started = [
      subprocess.Popen(
        [sys.executable, "-c", TRY, code],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
      )
      for _ in range(3)
    ]
    said = {process.communicate(timeout=300)[0].strip() for process in started}
  (folder,) = said
  assert artifacts.load(folder).kind == "vae"
  assert not [*(tmp_path / "drift_jax").rglob("*.tmp")]

"""Inputs that are missing: all at once, each with what makes it."""

import functools
import importlib
import re
import shlex
import sys
import types

import numpy as np
import pytest

from drift_jax.data import hub_files
from drift_jax.system import hub as hub_lib
from drift_jax.system import processes, sharding
from drift_jax.system.errors import ERRORS, ConfigError
from drift_jax.system.processes import PeerError
from drift_jax.tasks import parse
from drift_jax.tasks.generator.evaluators import network_evaluators
from drift_jax.tasks.generator.train import _inputs
from drift_jax.training import frozen, inputs, released, remedies
from tests import commands
from tests.autoencoders import save_vae
from tests.fake_hub import hub
from tests.judges import save_inception, save_random_statistics
from tests.process import ROOT, call
from tests.released_hub import repositories

JUDGES = ["eval.inception.path", "eval.inception.reference"]
OF_LATENTS = ["vae.path", "data.source", "encoders.mae.path", *JUDGES]
# {config: keys of what it lacks in an empty folder}.
EMPTY = {
  "imagenet_pixel:l16": [
    *("data.source", "encoders.convnext.path", "encoders.mae.path", *JUDGES),
  ],
  "imagenet_pixel:b16,folder": [
    *("data.source", "encoders.convnext.path", "encoders.mae.path", *JUDGES),
  ],
  "imagenet_latent:ablation": OF_LATENTS,
  "imagenet_latent:l2,folder": OF_LATENTS,
  "imagenet_latent:moco": [
    *("vae.path", "data.source", "encoders.moco.path", *JUDGES),
  ],
  "imagenet_latent:simclr": [
    *("vae.path", "data.source", "encoders.simclr.path", *JUDGES),
  ],
  "imagenet_latent:b4_512px": OF_LATENTS,
  "imagenet_latent:l4_512px,folder": OF_LATENTS,
  "mae_latent:640": ["vae.path", "data.source"],
  "mae_latent:640_512px": ["vae.path", "data.source"],
  "images:256": ["vae.path", "data.source", "data.source", "encoders.mae.path"],
  # Which config trains its encoder only the command line says.
  "cifar10:generator": ["data.source", "encoders.mae"],
}


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  return tmp_path


# What these would ask the hub for.
HERE = {"images:256": {"vae.path": "vae", "encoders.mae.path": "encoder"}}


def get(name, **changes):
  changes = HERE.get(name, {}) | changes
  file, _, variant = name.partition(":")
  config = importlib.import_module(f"configs.{file}").get_config(variant)
  config.update_from_flattened_dict(changes)
  return parse(config)


def look(config, workdir="runs/new"):
  """What training does before it opens anything."""
  if config.task == "mae":
    wanted = inputs.image_inputs(config, is_new=True, tested=True)
  else:
    wanted = _inputs(config, workdir)
  inputs.require(wanted, config)


def lines(config):
  with pytest.raises(ConfigError) as caught:
    look(config)
  head, *rest = str(caught.value).splitlines()
  assert head == f"{len(rest)} inputs are missing:"
  return [line.strip() for line in rest]


def commands_of(line):
  """Those of a line KEY=VALUE: WHAT (SIZE): COMMAND, or COMMAND."""
  found = re.fullmatch(r"(\S+)='[^']*': [^:]+?(?: \([^()]*\))?: (.*)", line)
  assert found, line
  return found[2].split(", or ")


def resolved(name, line):
  """A line's commands of programs; a flag alone is one of the run itself."""
  file, _, variant = name.partition(":")
  own = f"python -m drift_jax.main --config=configs/{file}.py:{variant}"
  for command in commands_of(line):
    if command.startswith("python -c "):
      compile(shlex.split(command)[2], "command", "exec")
    elif command.startswith("python -m "):
      yield command
    else:
      yield f"{own} --workdir=x {command.removeprefix('put them there, ')}"


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_folder_lacks_all_of_them(name, empty):
  found = lines(get(name))
  assert [re.split("[=:]", line)[0] for line in found] == EMPTY[name]
  assert not list(empty.iterdir())


def test_arrays_of_another_encoder_that_are_not_there(empty):
  found, _ = lines(get("imagenet_rae", init_from="nowhere"))
  (command,) = resolved("imagenet_rae", found)
  assert "cache_latents --source=npy:DIR --split=train" in command
  assert commands.mistakes([command]) == {}


def test_every_command_is_one_of_its_program(monkeypatch):
  """And so are those of an encoder that another variant of the file trains."""
  every = [
    command
    for name in EMPTY
    if name != "cifar10:generator"
    for line in lines(get(name))
    for command in resolved(name, line)
  ]
  for argument, variant in (
    ("cifar10.py", "encoder"),
    ("mnist.py:cpu", "cpu_encoder"),
    ("mnist.py:smoke", "encoder,smoke"),
  ):
    flag = "--config.data.data_dir=nowhere"
    monkeypatch.setattr(sys, "argv", ["main", f"--config={argument}", flag])
    with monkeypatch.context() as here:
      here.chdir(ROOT / "configs")
      found = lines(get(argument.replace(".py", ""), **{"data.data_dir": "x"}))
    (command,) = commands_of(found[-1])
    file = argument.partition(":")[0]
    assert f"--config={file}:{variant} " in command and flag in command
    every.append(command.replace("--config=", "--config=configs/", 1))
  assert len(every) > 30
  assert commands.mistakes(sorted(set(every))) == {}


@pytest.mark.parametrize(
  ("name", "flags", "encoder", "size"),
  [
    ("imagenet_latent:b2", "", "mae_latent.py:640 ", "42 GB"),
    (
      "imagenet_latent:b4_512px",
      "--image_size=512",
      "mae_latent.py:640_512px ",
      "168 GB",
    ),
    (
      "imagenet_latent:l4_512px,folder",
      "--image_size=512",
      "mae_latent.py:640_512px,folder ",
      "168 GB",
    ),
    ("images:256", "--held_out=0.1", "mae_latent.py:256,", "32.8 kB an image"),
  ],
)
def test_latents_and_their_encoder_are_of_the_images(
  name, flags, encoder, size
):
  found = lines(get(name))
  latents = [line for line in found if line.startswith("data.source")]
  told = [line for line in found if line.startswith("encoders.mae")]
  for line in latents:
    others = {"--image_size", "--held_out"} - {flags.partition("=")[0]}
    assert f"({size})" in line and flags in line
    assert not any(flag in line for flag in others)
  assert encoder in told[0] and len(told) == 1
  assert ("hf://" in told[0]) == ("512px" not in name)


def test_an_encoder_that_nobody_trains_has_no_command():
  """Patches of another size than published weights fold."""
  changes = {
    "model.input_size": 64,
    "model.patch_size": 4,
    "encoders.mae.model.input_patch_size": 2,
  }
  for line in lines(get("imagenet_latent:ablation", **changes)):
    if line.startswith("encoders.mae"):
      assert "--config" not in line


TWO, ONE = [["a", "b"], ["a"]], [["a"], ["a"]]


@pytest.mark.parametrize(
  ("told", "own", "error", "text"),
  [
    ([[], []], 0, None, ""),
    (ONE, 0, OSError, "a"),
    (ONE, 1, OSError, "a"),
    # The first process has all, or lacks what the other one has.
    ([[], ["a"]], 0, PeerError, r"^a \(in processes \[1\]\)$"),
    ([[], ["a"]], 1, OSError, "^a$"),
    ([["a"], []], 0, OSError, "^a$"),
    ([["a"], []], 1, PeerError, "process 0"),
    # Several.
    (TWO, 0, ConfigError, r"2 inputs.*\n  a\n  b \(in processes \[0\]\)$"),
    (TWO, 1, PeerError, "process 0"),
    ([[], ["a", "b"]], 0, PeerError, r"a \(in processes \[1\]\)\n  b \("),
    ([[], ["a", "b"]], 1, PeerError, "process 0"),
    ([["a"], ["b"], []], 2, PeerError, "process 0"),
    ([["a"], ["b"], []], 0, ConfigError, r"a .*\[0\]\)\n  b .*\[1\]\)"),
  ],
)
def test_no_process_goes_on_alone(monkeypatch, told, own, error, text):
  monkeypatch.setattr(processes, "is_first", lambda: own == 0)

  def from_all(function):
    assert function() == told[own]
    return told

  def missing(name):
    raise OSError(name)

  monkeypatch.setattr(processes, "from_all", from_all)
  monkeypatch.setattr(remedies, "line", lambda entry, error, config: str(error))
  wanted = [
    inputs.Input("key", name, functools.partial(missing, name))
    for name in (*told[own], *told[own])
  ]
  if error is None:
    inputs.require(wanted, None)
    return
  with pytest.raises(error, match=text) as caught:
    inputs.require(wanted, None)
  assert type(caught.value) is error


def test_a_wrong_flag_would_be_seen():
  wrong = [
    "python -m drift_jax.tools.convert_weights vae --sauce=x --out=y",
    "python -m drift_jax.tools.convert_weight vae",
    "python -m drift_jax.main --config=configs/digits.py:smok --workdir=x",
    "python -m drift_jax.main --config=configs/digits.py --config.sed=1",
  ]
  right = "python -m drift_jax.main --config=configs/digits.py --workdir=x"
  assert commands.mistakes([*wrong, right]).keys() == set(wrong)


@pytest.fixture(scope="module")
def there(tmp_path_factory):
  """{key: value} of all that the ablation reads, but for its data."""
  folder = tmp_path_factory.mktemp("there")
  vae = str(save_vae(folder / "vae"))
  inception = save_inception(folder / "inception", published=True)
  statistics = save_random_statistics(
    folder / "statistics.npz", inception, resolution=8, crop="center"
  )
  (folder / "latents" / "train").mkdir(parents=True)
  return {
    "vae.path": vae,
    "data.source": f"latents:{folder}/latents",
    "encoders.mae.path": vae,
    "eval.inception.path": str(inception),
    "eval.inception.reference": str(statistics),
  }


def judges(config):
  network_evaluators(
    config.eval.metrics,
    {"inception": config.eval.inception},
    count=100,
    seed=0,
    resolution=8,
    crop="center",
    mesh=sharding.make_mesh(),
  )


# {key: what opens it}.
OPENERS = {
  "vae.path": lambda config: frozen.load_vae(config.vae, sharding.make_mesh()),
  "encoders.mae.path": lambda config: frozen.load_encoders(
    config.encoders, sharding.make_mesh()
  ),
  "data.source": lambda config: inputs.open_readers(
    config, types.SimpleNamespace(sha256="")
  ),
  "eval.inception.path": judges,
  "eval.inception.reference": judges,
}


def raised(function, *arguments):
  with pytest.raises(ERRORS) as caught:
    function(*arguments)
  return str(caught.value)


@pytest.mark.parametrize("key", OPENERS)
def test_a_single_one_says_what_opening_it_says(there, key):
  look(get("imagenet_latent", **there))
  value = "latents:nowhere" if key == "data.source" else "nowhere"
  config = get("imagenet_latent", **there | {key: value})
  assert raised(look, config) == raised(OPENERS[key], config)


@pytest.mark.parametrize("kind", ["folder", "tar", "tfds"])
def test_images_that_are_not_there(kind):
  config = get("cifar10:smoke", **{"data.source": f"{kind}:nowhere"})
  wanted = inputs.image_inputs(config, is_new=True, tested=False)
  opening = raised(inputs.open_readers, config, None)
  assert raised(inputs.require, wanted, config) == opening


def of_hub(monkeypatch, names, size=1):
  """Data of the hub: a data set of such files, all still to be downloaded."""
  dataset = hub_files.Dataset("o/n", 40 * "a", dict.fromkeys(names, size))
  monkeypatch.setattr(hub_files, "list_dataset", lambda *_: dataset)
  return {"data.source": "hf://datasets/o/n"}


SHARDS = ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet")


@pytest.mark.parametrize(
  ("names", "tested", "held_out", "sizes"),
  [
    (SHARDS, False, 0, [10]),
    (SHARDS, True, 0, [10, 10]),
    # Whether there is a test split decides what is trained on.
    (SHARDS, False, 2, [10, 10]),
    (SHARDS[:1], True, 2, [10]),
  ],
)
def test_data_of_the_hub_are_among_the_downloads(
  monkeypatch, empty, names, tested, held_out, sizes
):
  monkeypatch.setattr(hub_lib, "downloads", lambda: empty)
  changes = of_hub(monkeypatch, names, 10) | {"data.held_out": held_out}
  config = get("cifar10:smoke", **changes)
  wanted = inputs.image_inputs(config, is_new=True, tested=tested)
  needs = [need for entry in wanted for need in entry.check()]
  assert [need.size for need in needs] == sizes
  assert all("files of hf://datasets/o/n@aaa" in need.what for need in needs)


def test_data_of_the_hub_that_do_not_fit_or_lack_a_split(monkeypatch):
  changes = of_hub(monkeypatch, SHARDS, 10**18) | {"data.held_out": 0}
  config = get("cifar10:smoke", **changes)
  wanted = inputs.image_inputs(config, is_new=True, tested=True)
  assert "(1e+09 GB)" in raised(inputs.require, wanted, config)
  of_hub(monkeypatch, SHARDS[:1])
  assert "no split 'test'" in raised(inputs.require, wanted, config)


def test_a_hub_that_is_not_reached_is_one_line(monkeypatch):
  def fail(*_):
    raise hub_lib.HubError("hf://datasets/o/n@main: no network")

  monkeypatch.setattr(hub_files, "list_dataset", fail)
  changes = {"data.source": "hf://datasets/o/n", "data.held_out": 2}
  data, encoder = lines(get("cifar10:generator", **changes))
  assert data == "hf://datasets/o/n@main: no network"
  assert encoder.startswith("encoders.mae")


def test_statistics_without_single_images(there, empty):
  file = str(empty / "statistics.npz")
  np.savez(file, mu=np.zeros(128), sigma=np.eye(128))
  config = get(
    "imagenet_latent",
    **there
    | {
      "eval.metrics": ("fid", "precision_recall"),
      "eval.inception.reference": file,
    },
  )
  assert raised(look, config) == raised(judges, config)


@pytest.mark.system
def test_what_the_hub_lacks_and_what_no_disk_takes(empty):
  """Of a real start: nothing large is fetched, and nothing is written."""
  large = "models/mae/jax/mae_latent_256/ema_params.msgpack"
  downloads = []
  with hub(
    repositories(), claimed={large: 10**18}, downloads=downloads
  ) as address:
    done = call(
      *("-m", "drift_jax.main", "--config=configs/imagenet_latent.py:ablation"),
      f"--workdir={empty}/run",
      f"--config.vae.path={released.AUTOENCODER}",
      "--config.encoders.mae.path=hf://mae_latent_256",
      "--config.init_from=hf://latent_S",
      HF_ENDPOINT=address,
      HF_HUB_OFFLINE="",
      HF_HUB_DISABLE_XET="1",
      HF_HOME=f"{empty}/cache",
      XDG_CACHE_HOME="",
    )
  assert done.returncode == 1 and "Traceback" not in done.stderr
  head, data, start, *judges, space = done.stderr.splitlines()[-6:]
  assert head == "Error: 5 inputs are missing:"
  assert data.startswith("  data.source='latents:") and len(judges) == 2
  assert start.startswith("  init_from: hf://latent_S: ")
  for part in ("hf://mae_latent_256 (1e+09 GB)", released.AUTOENCODER, "free"):
    assert part in space
  small = {"config.json", "metadata.json"}
  assert {name.rpartition("/")[2] for _, name, _ in downloads} <= small
  assert not (empty / "run").exists()

"""Config validation: every mistake is named before anything compiles."""

import dataclasses
import functools
import json
import pathlib
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import (
  cifar10,
  common,
  digits,
  imagenet_latent,
  images,
  mae_latent,
  mnist,
  policy,
  toy,
)
from drift_jax import config as config_lib
from drift_jax.models.arguments import argument_types
from drift_jax.models.generator import Generator
from drift_jax.models.mae import MAE
from drift_jax.tasks import TASKS, config_class, parse
from drift_jax.tasks.generator import train
from drift_jax.tasks.generator.config import GeneratorModel
from drift_jax.tasks.mae import train as train_mae
from drift_jax.tasks.mae.config import MaeModel
from drift_jax.tasks.policy import train as train_policy
from drift_jax.tasks.toy import train as train_toy
from drift_jax.training import loop, state
from tests.autoencoders import save_vae
from tests.data import pictures
from tests.judges import save_inception, save_random_statistics

ROOT = pathlib.Path(__file__).parent.parent


def generator():
  return digits.get_config()


def mae():
  return digits.get_config("encoder")


# What can't be set, and what the error must name besides the key, if anything.
GENERATOR = [
  # Keys and types.
  ("drift.temperature", (0.1,), r"drift\.temperature=.*did you mean temper"),
  ("drfit", 1, "unknown key drfit=1: did you mean drift"),
  ("optim.lr", 0.1, r"unknown key optim\.lr=0\.1: .*learning_rate"),
  ("encoders.mae", {"pth": "x"}, r"mae\.pth='x': did you mean path"),
  ("seed", "0", "seed='0' has type str, want int"),
  ("model.depth", 2.0, "has type float, want int"),
  ("seed", True, "seed=True has type bool, want int"),
  ("drift.temperatures", 0.1, "has type float, want a tup"),
  ("drift.temperatures", ("a",), r"temperatures\[0\]='a' has type str"),
  ("optim", 3, "optim=3 must be a section"),
  ("encoders", (), "must be a dict"),
  ("optim.learning_rate", float("nan"), "must be a finite"),
  ("eval.alphas", (1.0, float("inf")), r"alphas\[1\]=inf must be a finite"),
  # Ranges and choices.
  ("task", "train", "'generator', 'mae', 'policy', 'toy'"),
  ("seed", 2**32, "must be at most 4294967295"),
  ("optim.learning_rate", 0.0, "must be positive"),
  ("optim.b2", 1 - 1e-9, "must be at most"),  # 1 in float32
  ("optim.eps", 1e-50, "must be positive"),  # 0 in float32
  ("ema.decays", (), ""),
  ("ema.decays", (0.9, 0.9), "twice"),
  ("writers", ("jsonl", "wanb"), "did you mean 'wandb'"),
  ("writers", ("jsonl", "jsonl"), "twice"),
  ("writers", ("tensorboard", "wandb"), "lacks 'jsonl'"),
  ("data.source", "folders:x", "'latents:DIR'.*mean 'folder:D"),
  ("data.source", "tar:", "valid options"),
  ("data.source", "digits:x", "valid options"),
  ("data.crop", "centre", "'random'.*did you mean 'center'"),
  ("data.crop_scale", (0.5, 0.2), ""),
  ("data.crop_scale", (0.5,), ""),
  ("data.train_split", "", "is empty"),
  ("drift.temperatures", (), "at least one positive"),
  ("drift.temperatures", (0.1, -0.1), "at least one positive"),
  ("drift.temperatures", (0.1, 0.1), "twice"),
  ("guidance.minimum", 0.5, "want 1 <= minimum <= maximum"),
  ("guidance.no_cfg_frac", 1.5, ""),
  ("eval.alphas", (), "empty"),
  ("eval.alphas", (1.0, 2, 2.0), "holds a value"),
  ("eval.metrics", ("fdi",), "'fdi': valid options are"),
  ("eval.metrics", ("fd_pixel", "fd_pixel"), "twice"),
  ("eval.num_samples", 1, "at least 2"),
  # Contradictions.
  ("optim.warmup_steps", 10**6, "is longer than"),
  ("eval.ema_decay", 0.5, "is not one of"),
  ("mesh.fsdp", -1, "mesh.data=-1 and mesh.fsdp=-1: only one may"),
  ("checkpoint.best_metric", "fid", "is not computed"),
  ("checkpoint.best_metric", "coverage", r"a distance \('fid', 'kid'"),
  ("checkpoint.every", 500, r"eval.every=250 and checkpoint.every=500: only"),
  ("eval.every", 0, r"'fd_pixel' with eval.every=0 and checkpoint.every=250"),
  ("train.accum_labels", 5, "does not divide batch.labels=16"),
  ("data.held_out", 1.5, "a number of images of each class, or a share"),
  ("data.test_split", "train", "are both 'train'.*not be trained on"),
  ("vae.path", "x", "with data.source='digits'.*latent cache"),
  ("batch.positives", 500, "queue.class_size=128 can't give"),
  ("batch.unconditional", 0, "maximum=4.0 > 1 needs unconditional reals"),
  ("features.sample", False, "no features to drift in"),
  ("eval.alphas", (9.0,), r"9\.0 was never trained"),
  ("eval.metrics", ("fid",), r"\['fid'\], which need eval\.inception\.path"),
  ("eval.metrics", ("fd_dinov2",), r"eval\.dinov2\.path: .* dinov2 writ"),
  ("eval.metrics", ("fd_encoder", "fd_pixel"), "there are no encoders"),
  ("eval.metrics", ("fd_classifier",), r"need eval\.classifier\.path"),
  ("eval.num_samples", 55, "can't be balanced"),
  ("model.out_channels", 3, "in_channels=1 and model.out_channels=3"),
]
ENCODER = [
  ("mae.mask_ratio", 1.0, ""),
  ("mae.mask_ratio", 0.0, "only classification trains.*make them equal"),
  ("mae.classification_steps", 10**6, ""),
  ("model.layers", (1, 1), ""),
  ("checkpoint.best_metric", "fd_pixel", "valid options"),
  ("drift", {}, "unknown key"),
]
LATENTS = [
  ("data.wire", "uint8", "can't hold latents.*'bfloat16'"),
  ("data.held_out", 5, "with data.source='latents:.*not divided"),
  ("data.exif", True, "with data.source='latents:.*cache_latents --exif"),
]
PIXELS = [("encoders.mae.decode", True, r"needs vae\.path.*decode=False")]


@pytest.mark.parametrize(
  ("get_config", "key", "value", "message"),
  [
    (get_config, *case)
    for get_config, cases in (
      (generator, GENERATOR),
      (mae, ENCODER),
      (imagenet_latent.get_config, LATENTS),
      (cifar10.get_config, PIXELS),
    )
    for case in cases
  ],
)
def test_what_is_refused(get_config, key, value, message):
  check_rejected(get_config(), key, value, message or key)


def test_configs_survive_json():
  config = digits.get_config("features,smoke")
  with pytest.raises(config_lib.ConfigError, match=r"encoders\.mae\.path"):
    parse(config)
  config.encoders.mae.path = "somewhere"
  for values in (config, generator(), mae()):
    parsed = parse(values)
    assert parse(json.loads(config_lib.to_json(parsed))) == parsed


def bounded(section, path=""):
  """(dotted key, type of the value) of all fields with bounds or choices."""
  hints = typing.get_type_hints(type(section), include_extras=True)
  for name, hint in hints.items():
    value = getattr(section, name)
    if dataclasses.is_dataclass(value):
      yield from bounded(value, f"{path}{name}.")
    elif typing.get_origin(hint) is tuple:
      yield path + name, typing.get_args(hint)[0], True
    else:
      yield path + name, hint, False


@pytest.mark.parametrize("config", [generator(), mae()], ids=["gen", "mae"])
def test_every_bound_and_every_choice_is_kept(config):
  """What lies outside of a field's type is refused, naming the key."""
  count = 0
  for key, hint, is_tuple in bounded(parse(config)):
    for bad in out_of(hint):
      count += 1
      message = rf"{re.escape(key)}={bad!r}( must be at least|: valid options)"
      check_rejected(config, key, (bad,) if is_tuple else bad, message)
  assert count > 15


def out_of(hint):
  """Values of the right type that a field of this type can't hold."""
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin is typing.Literal:
    yield 4 if isinstance(arguments[0], int) else "other"
  elif origin is typing.Annotated:
    for mark in arguments[1:]:
      if hasattr(mark, "least"):
        yield arguments[0](mark.least - 1)


def check_rejected(config, key, value, message):
  values = config.to_dict()
  section = values
  *parents, leaf = key.split(".")
  for name in parents:
    section = section[name]
  section[leaf] = value
  with pytest.raises(config_lib.ConfigError, match=message) as error:
    parse(values)
  assert leaf in str(error.value)


@pytest.mark.parametrize(
  ("positives", "unconditional", "drawn"), [(65, 8, "posi"), (8, 65, "uncond")]
)
def test_a_first_step_that_must_fail(positives, unconditional, drawn):
  """Prefilling rounds up to whole batches: 33 -> 2 batches of 32."""
  values = generator().to_dict()
  values["batch"].update(positives=positives, unconditional=unconditional)
  values["queue"].update(push_per_step=32, prefill=33)
  parse(values)
  values["queue"]["prefill"] = 32
  with pytest.raises(
    config_lib.ConfigError,
    match=rf"leave 64 samples .* first step, fewer than batch\.{drawn}\w+=65",
  ):
    parse(values)
  values["queue"]["with_replacement"] = True
  parse(values)


def test_an_encoder_is_not_called_as_the_autoencoder():
  values = imagenet_latent.get_config("convnext").to_dict()
  values["encoders"]["vae"] = values["encoders"].pop("convnext")
  with pytest.raises(config_lib.ConfigError, match=r"encoders\.vae: .*another"):
    parse(values)


def test_latents_do_not_end_at_black_and_white():
  values = imagenet_latent.get_config().to_dict()
  values["model"]["clip"] = True
  with pytest.raises(
    config_lib.ConfigError, match=r"model\.clip=True .*=False"
  ):
    parse(values)


def test_without_a_best_evaluations_and_saves_are_independent():
  values = generator().to_dict()
  values["checkpoint"].update(best_metric="", every=100)
  parse(values)
  values["eval"].update(every=0, metrics=())
  parse(values)


def test_overrides_of_unknown_keys():
  values = generator().to_dict()
  config_lib.check_override(values, "drift.temperatures", "1")
  config_lib.check_override(values, "drift", "{}")
  for key, message in (
    ("drift.temprature", r"='1': did you mean temperatures or "),
    ("optim.schedule.x", r"x='1': optim\.schedule is a value, not a"),
    ("encoders.mae.path", "encoders.mae='1': this section is empty"),
  ):
    with pytest.raises(config_lib.ConfigError, match=message):
      config_lib.check_override(values, key, "1")


def test_missing_keys_are_named():
  values = generator().to_dict()
  del values["drift"]["repulsion"]
  with pytest.raises(config_lib.ConfigError, match=r"missing key drift\.repul"):
    parse(values)


def test_a_run_from_before_a_key_is_still_read():
  config = generator()
  del config.processes.join_timeout
  assert parse(config).processes.join_timeout == 600
  assert generator().processes.join_timeout == 600


def test_a_single_sample_has_nothing_that_repels_it():
  values = generator().to_dict()
  values["batch"].update(generated=1, unconditional=0)
  values["guidance"]["maximum"] = 1.0
  with pytest.raises(config_lib.ConfigError, match="nothing repels"):
    parse(values)


def test_models_take_what_configs_give():
  """The sections are the constructors' arguments, name for name."""
  for section, module in ((GeneratorModel, Generator), (MaeModel, MAE)):
    fields = {f.name: plain(f.type) for f in dataclasses.fields(section)}
    types = argument_types(module)
    assert fields == {
      name: str if kind is jnp.dtype else kind for name, kind in types.items()
    }


def plain(hint):
  """A type without its bounds and choices."""
  (first, *_) = typing.get_args(hint) or (hint,)
  if typing.get_origin(hint) is typing.Literal:
    return type(first)
  return first if typing.get_origin(hint) is typing.Annotated else hint


def section_types(cls):
  """A config class and every section below it."""
  found = {cls}
  for hint in typing.get_type_hints(cls).values():
    for item in (hint, *typing.get_args(hint)):
      if dataclasses.is_dataclass(item):
        found |= section_types(item)
  return found


@pytest.fixture
def reads(monkeypatch):
  """{(section, field)} that is read, but for validation and config.json."""
  recorded = set()
  paused = []

  def recording(self, name):
    if not paused and not name.startswith("_"):
      recorded.add((type(self).__name__, name))
    return object.__getattribute__(self, name)

  def pausing(function):
    @functools.wraps(function)
    def wrapped(*args):
      paused.append(function)
      try:
        return function(*args)
      finally:
        paused.pop()

    return wrapped

  monkeypatch.setattr(config_lib, "to_json", pausing(config_lib.to_json))
  for task in TASKS:
    cls = config_class(task)
    monkeypatch.setattr(cls, "check", pausing(cls.check))
  monkeypatch.setattr(
    config_lib.Section, "__getattribute__", recording, raising=False
  )
  return recorded


@pytest.fixture
def no_steps(monkeypatch):
  """Training without its steps, which take long to compile and see no config:
  a state of zeros is evaluated, then returned."""
  abstract_and_init = state.abstract_and_init

  def zeros(*args, **kwargs):
    abstract, _ = abstract_and_init(*args, **kwargs)
    return abstract, lambda: jax.tree.map(
      lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), abstract
    )

  def fit(self, state):
    self.feed.start()
    next(self.feed)
    self.best_metric(self.evaluate(1, state, lambda: None))
    return state

  monkeypatch.setattr(state, "abstract_and_init", zeros)
  monkeypatch.setattr(loop.Loop, "fit", fit)


@pytest.mark.slow
def test_every_key_is_read(reads, no_steps, tmp_path):
  """No dead options: digits and images together look at every field."""
  encoder = digits.get_config("encoder,smoke")
  encoder.model.base_channels = 4
  encoder.generator.labels = 1
  train_mae.train_and_evaluate(encoder, str(tmp_path / "mae"))
  config = digits.get_config("features,smoke")
  config.encoders.mae.path = str(tmp_path / "mae" / "encoder")
  config.model.update(depth=1, hidden_size=16, cond_dim=16, num_heads=2)
  judge = str(save_inception(tmp_path / "inception"))
  statistics = save_random_statistics(
    tmp_path / "digits.npz", judge, resolution=8, crop="none"
  )
  config.eval.inception.update(path=judge, reference=str(statistics))
  config.eval.metrics = ("fd_inception", *config.eval.metrics)
  config.eval.update(num_samples=20, batch_size=20, alphas=(1.0,))
  train.train_and_evaluate(config, str(tmp_path / "generator"))
  for label in range(2):
    for number in range(3):
      path = tmp_path / "images" / f"class{label}" / f"{number}.png"
      pictures.write(path, 3 * label + number)
  save_vae(tmp_path / "vae")
  latents = mae_latent.get_config("smoke")
  latents.data.update(
    source=f"folder:{tmp_path / 'images'}", held_out=1, image_size=16
  )
  latents.model.in_channels = 2
  latents.vae.path = str(tmp_path / "vae")
  train_mae.train_and_evaluate(latents, str(tmp_path / "latents"))
  points = toy.get_config("smoke")
  points.batch.labels = 8
  train_toy.train_and_evaluate(points, str(tmp_path / "toy"))
  train_policy.train_and_evaluate(
    policy.get_config("diffusion,smoke"), str(tmp_path / "policy")
  )
  fields = {
    (section.__name__, field.name)
    for task in TASKS
    for section in section_types(config_class(task))
    for field in dataclasses.fields(section)
  }
  # What main asks `parse`: which task it is, how processes are joined, and
  # whether compiled programs stay.
  chosen = {
    (name_of_class, name)
    for name_of_class in TASKS.values()
    for name in ("task", "processes")
  }
  chosen |= {
    ("Processes", name) for name in ("heartbeat_timeout", "join_timeout")
  } | {("Train", "keep_compiled"), ("GeneratorTrain", "keep_compiled")}
  assert fields - chosen - reads == set()


def check_resumed(config, changes):
  """Checks a resume of `config` with {key: value} changed."""
  old = config_lib.to_json(parse(config))
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  config_lib.check_resumable(old, config_lib.to_json(parse(config)))


def test_home_folders_are_expanded(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  config = digits.get_config("features")
  old = config.to_dict()
  values = {
    "data.source": "folder:~/data",
    "data.data_dir": "~",
    "encoders.mae.path": "~/encoder",
    "eval.inception.path": "~/inception",
    "eval.inception.reference": "~/stats.npz",
    "eval.labels": "~/labels.txt",
    "init_from": "~/runs/a",
  }
  for key, value in values.items():
    *sections, name = key.split(".")
    section = old
    for part in sections:
      section = section[part]
    section[name] = value
  written = config_lib.to_json(parse(old))
  parsed = config_lib.flatten(json.loads(written))
  for key, value in values.items():
    assert parsed[key] == value.replace("~", "/home/me")
  config_lib.check_resumable(json.dumps(old), written)
  policies = policy.get_config().to_dict()
  policies["data"]["source"] = "zarr:~/x.zarr"
  assert parse(policies).data.source == "zarr:/home/me/x.zarr"


def test_runs_of_before_exif_resume_without_it():
  config = digits.get_config()
  new = config_lib.to_json(parse(config))
  old = json.loads(new)
  del old["data"]["exif"]
  before = json.dumps(config_lib.completed(old, parse(config)))
  config_lib.check_resumable(before, new)
  config.data.exif = True
  with pytest.raises(config_lib.ConfigError, match="data.exif: False -> True"):
    config_lib.check_resumable(before, config_lib.to_json(parse(config)))
  assert parse(old).data.exif is False


def test_resumed_runs_may_change_what_is_harmless():
  config = generator()
  config.optim.schedule = "constant"
  config.train.num_steps = 1_500
  check_resumed(
    config,
    {
      "train.num_steps": 3_000,
      "train.log_every": 7,
      "checkpoint.on_corrupt": "previous",
      "checkpoint.keep_latest": 5,
      "eval.every": 500,
      "eval.metrics": ("fd_pixel",),
      "mesh.fsdp": 8,
      "vae.sharding": "replicated",
      "data.num_threads": 4,
      "writers": ("jsonl", "trackio"),
      "queue.with_replacement": True,
      "train.accum_labels": 4,
      # Both are what to change when a run ends on a damaged image, or is slow.
      "data.max_corrupt": 5,
      "data.in_memory": True,
    },
  )


@pytest.mark.parametrize(
  ("key", "before", "after"),
  [
    ("optim.learning_rate", 1e-3, 5e-4),
    ("train.accum_labels", 2, 4),
    ("data.held_out", 0.0, 1.0),
  ],
)
def test_resumed_runs_may_not_become_another_experiment(key, before, after):
  config = generator()
  config.train.accum_scalars = "group"
  config.update_from_flattened_dict({key: before})
  with pytest.raises(
    config_lib.ConfigError,
    match=f"new workdir .*{re.escape(f'{key}: {before!r} -> {after!r}')}",
  ):
    check_resumed(config, {key: after})


def test_all_labels_at_once_are_all_that_fit_for_scalars_of_a_group():
  config = generator()
  config.train.update(accum_scalars="group", accum_labels=0)
  check_resumed(config, {"train.accum_labels": -1})


def test_runs_whose_course_depends_on_their_end_keep_it():
  config = generator()
  config.optim.schedule = "cosine"
  config.train.num_steps = 1_500
  with pytest.raises(
    config_lib.ConfigError,
    match=r"num_steps: 1500 -> 3000 .*optim\.schedule='cosine' reaches its end",
  ):
    check_resumed(config, {"train.num_steps": 3_000})
  config = mae()
  config.optim.schedule = "constant"
  config.train.num_steps = 600
  config.mae.classification_steps = 200
  with pytest.raises(
    config_lib.ConfigError,
    match=r"num_steps: 600 -> 900 .*classification_steps=200 steps train other",
  ):
    check_resumed(config, {"train.num_steps": 900})
  config.train.num_steps = 600
  config.mae.classification_steps = 0
  check_resumed(config, {"train.num_steps": 900})


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("checkpoint.best_metric", ""),
    ("eval.num_samples", 270),
    ("eval.alphas", (1.0,)),
    ("eval.ema_decay", 0.99),
    ("eval.pixels", "round"),
    ("eval.label_order", "class"),
  ],
)
def test_ranks_do_not_mix(key, value):
  with pytest.raises(
    config_lib.ConfigError, match=rf"ranked by 'fd_pixel'.*Changed: {key}"
  ):
    check_resumed(generator(), {key: value})
  config = generator()
  config.checkpoint.best_metric = ""
  check_resumed(config, {key: value})


def test_a_key_that_is_younger_than_a_run_has_its_default():
  values = json.loads(config_lib.to_json(parse(generator())))
  for key in ("pixels", "label_order", "classifier"):
    del values["eval"][key]
  del values["drift"]["own_in_scale"]
  config = parse(values)
  assert (config.eval.pixels, config.eval.label_order) == ("truncate", "given")
  assert config.drift.own_in_scale is False
  assert config.eval.classifier.path == ""


@pytest.mark.parametrize(
  ("configs", "encoder", "generator"),
  [
    (cifar10, "encoder", "generator"),
    (cifar10, "encoder,smoke", "generator,smoke"),
    (cifar10, "cpu_encoder", "cpu"),
    (mnist, "cpu_encoder", "cpu"),
    (mnist, "encoder", "generator"),
    (images, "cpu,encoder,smoke", "cpu,smoke"),
  ],
)
def test_an_encoder_knows_what_its_generator_takes(configs, encoder, generator):
  needs = parse(configs.get_config(encoder)).generator
  config = parse(configs.get_config(generator))
  taken = config.batch, config.eval
  for field in dataclasses.fields(needs):
    section = taken[field.name == "num_samples"]
    assert getattr(needs, field.name) == getattr(section, field.name)


def test_common_defaults_are_the_ablation_settings():
  """Table 8, first column."""
  config = common.generator()
  assert config.batch.to_dict() == {
    "reals": "queue",
    "labels": 64,
    "generated": 64,
    "negatives": 0,
    "positives": 64,
    "unconditional": 16,
  }
  assert config.drift.temperatures == (0.02, 0.05, 0.2)
  assert config.drift.affinity_floor == 1e-6
  assert (config.optim.b1, config.optim.b2) == (0.9, 0.95)
  assert config.optim.grad_clip == 2.0
  assert config.guidance.exponent == 3.0


@pytest.mark.parametrize(
  ("argument", "workdir"),
  [
    ("configs/imagenet_pixel.py", "runs/imagenet_pixel"),
    ("imagenet_pixel:b16,folder", "runs/imagenet_pixel_b16_folder"),
    ("/a b/my config.py:x=*?[1]", "runs/my_config_x_1"),
    ("configs/ablations.py:mnist:cpu/t/row", "runs/ablations_mnist_cpu_t_row"),
  ],
)
def test_a_run_without_a_workdir_has_a_name_without_odd_characters(
  argument, workdir
):
  assert config_lib.default_workdir(argument) == workdir

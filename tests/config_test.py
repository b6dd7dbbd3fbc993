"""Config validation: every mistake is named before anything compiles."""

import dataclasses
import importlib.util
import inspect
import json
import pathlib
import re
import typing

import pytest

from configs import common, digits
from drift_jax import config as config_lib
from drift_jax import models

ROOT = pathlib.Path(__file__).parent.parent


def generator():
  return digits.get_config()


def mae():
  return digits.get_config("encoder")


@pytest.mark.parametrize(
  "variant", ["", "smoke", "encoder", "encoder,smoke", "features,smoke"]
)
def test_configs_are_valid(variant):
  config = digits.get_config(variant)
  if "features" in variant:
    with pytest.raises(config_lib.ConfigError, match=r"encoders\.mae\.path"):
      config_lib.parse(config)
    config.encoders.mae.path = "somewhere"
  parsed = config_lib.parse(config)
  again = config_lib.parse(json.loads(config_lib.to_json(parsed)))
  assert again == parsed


def test_unknown_variants():
  with pytest.raises(ValueError, match="'smok'.*smoke"):
    digits.get_config("smok")
  with pytest.raises(ValueError, match="exclude"):
    digits.get_config("encoder,features")


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("drift.temperature", (0.1,), r"drift\.temperature=.*did you mean temper"),
    ("drfit", 1, "unknown key drfit=1: did you mean drift"),
    ("optim.lr", 0.1, r"unknown key optim\.lr=0\.1: .*learning_rate"),
    (
      "encoders.mae",
      {"pth": "x"},
      r"encoders\.mae\.pth='x': did you mean path",
    ),
  ],
)
def test_unknown_keys_name_the_closest(key, value, message):
  check_rejected(generator(), key, value, message)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("seed", "0", "seed='0' has type str, want int"),
    ("model.depth", 2.0, r"model\.depth=2\.0 has type float, want int"),
    ("model.remat", 1, r"model\.remat=1 has type int, want bool"),
    ("seed", True, "seed=True has type bool, want int"),
    ("drift.temperatures", 0.1, "temperatures=0.1 has type float, want a tup"),
    ("drift.temperatures", ("a",), r"temperatures\[0\]='a' has type str"),
    ("optim", 3, "optim=3 must be a section"),
    ("encoders", (), r"encoders=\(\) must be a dict"),
  ],
)
def test_wrong_types(key, value, message):
  check_rejected(generator(), key, value, message)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("task", "train", r"task='train': valid options are \['gen.*'mae'\]"),
    ("optim.schedule", "cosin", r"'cosin': valid .*did you mean 'cosine'"),
    ("optim.learning_rate", 0.0, "learning_rate=0.0 must be positive"),
    ("optim.b2", 1.0, r"b2=1\.0 must lie in"),
    ("optim.warmup_steps", 10**6, "warmup_steps=1000000 is longer than"),
    ("ema.decays", (), "ema.decays"),
    ("ema.decays", (0.9, 0.9), "twice"),
    ("eval.ema_decay", 0.5, r"ema_decay=0\.5 is not one of"),
    ("mesh.fsdp", 0, "mesh.fsdp=0"),
    ("checkpoint.on_corrupt", "ignore", r"'error', 'previous'"),
    ("checkpoint.best_metric", "fid", "best_metric='fid' is not computed"),
    ("checkpoint.best_metric", "coverage", "Frechet"),
    ("batch.labels", 0, "batch.labels=0 must be at least 1"),
    ("batch.labels", 64, "push_per_step=32 is less than batch.labels=64"),
    ("batch.positives", 500, "queue.class_size=128 can't give"),
    ("drift.temperatures", (), "at least one positive"),
    ("drift.temperatures", (0.1, -0.1), "at least one positive"),
    ("drift.temperatures", (0.1, 0.1), "twice"),
    ("drift.affinity_floor", -1e-6, "affinity_floor=-1e-06"),
    ("drift.normalization", "x", r"\['xy', 'y', 'none'\]"),
    ("guidance.minimum", 0.5, "want 1 <= minimum <= maximum"),
    ("guidance.no_cfg_frac", 1.5, r"no_cfg_frac=1\.5"),
    ("batch.unconditional", 0, "maximum=4.0 > 1 needs unconditional reals"),
    ("features.sample", False, "no features to drift in"),
    ("eval.alphas", (9.0,), r"9\.0 was never trained"),
    ("eval.alphas", (), "empty"),
    ("eval.metrics", ("fid",), "'fid': valid options are"),
    ("eval.metrics", ("fd_encoder", "fd_pixel"), "there are no encoders"),
    ("eval.num_images", 55, "num_images=55 can't be balanced"),
    ("model.out_channels", 3, "in_channels=1 and model.out_channels=3"),
    ("model.dtype", "float16", r"\['float32', 'bfloat16'\]"),
  ],
)
def test_contradictions(key, value, message):
  check_rejected(generator(), key, value, message)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("mae.mask_ratio", 1.0, r"mask_ratio=1\.0"),
    ("mae.classification_steps", 10**6, "classification_steps=1000000"),
    ("model.layers", (1, 1), r"layers=\(1, 1\)"),
    ("checkpoint.best_metric", "fd_pixel", "valid options"),
    ("drift", {}, "unknown key drift"),
  ],
)
def test_encoder_configs(key, value, message):
  check_rejected(mae(), key, value, message)


def check_rejected(config, key, value, message):
  values = config.to_dict()
  section = values
  *parents, leaf = key.split(".")
  for name in parents:
    section = section[name]
  section[leaf] = value
  with pytest.raises(config_lib.ConfigError, match=message):
    config_lib.parse(values)


def test_missing_keys_are_named():
  values = generator().to_dict()
  del values["drift"]["repulsion"]
  with pytest.raises(config_lib.ConfigError, match=r"missing key drift\.repul"):
    config_lib.parse(values)


def test_a_single_sample_has_nothing_that_repels_it():
  values = generator().to_dict()
  values["batch"].update(generated=1, unconditional=0)
  values["guidance"]["maximum"] = 1.0
  with pytest.raises(config_lib.ConfigError, match="nothing repels"):
    config_lib.parse(values)


def test_models_take_what_configs_give():
  """The sections are the constructors' arguments, name for name."""
  for section, builder in (
    (config_lib.GeneratorModel, models.build_generator),
    (config_lib.MaeModel, models.build_mae),
  ):
    names = {field.name for field in dataclasses.fields(section)}
    parameters = inspect.signature(builder).parameters.values()
    wanted = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert names == wanted


def section_types(cls, seen=None):
  seen = set() if seen is None else seen
  for hint in typing.get_type_hints(cls).values():
    for item in (hint, *typing.get_args(hint)):
      if dataclasses.is_dataclass(item) and item not in seen:
        seen.add(item)
        section_types(item, seen)
  return seen


def test_every_key_is_read():
  """No dead options: each field is used by name, or its section is splatted."""
  sources = "\n".join(
    path.read_text()
    for path in (ROOT / "drift_jax").rglob("*.py")
    if path.name != "config.py"
  )
  splatted = {
    section
    for section, pattern in (
      ("GeneratorModel", r"build_generator\(\*\*dataclasses\.asdict"),
      ("MaeModel", r"build_mae\(\*\*dataclasses\.asdict"),
      ("Drift", r"drift=dataclasses\.asdict\(config\.drift\)"),
      ("Guidance", r"guidance=dataclasses\.asdict\(config\.guidance\)"),
      ("Queue", r"\*\*dataclasses\.asdict\(config\.queue\)"),
    )
    if re.search(pattern, sources)
  }
  assert len(splatted) == 5
  for task in config_lib.TASKS.values():
    for section in section_types(task) | {task}:
      if section.__name__ in splatted:
        continue
      for field in dataclasses.fields(section):
        assert re.search(rf"\.{field.name}\b", sources), (
          f"{section.__name__}.{field.name} is never read"
        )


def test_resumed_runs_may_change_only_what_is_harmless():
  old = config_lib.to_json(config_lib.parse(generator()))
  longer = generator()
  longer.train.num_steps *= 2
  longer.checkpoint.on_corrupt = "previous"
  config_lib.check_resumable(old, config_lib.to_json(config_lib.parse(longer)))
  other = generator()
  other.optim.learning_rate = 5e-4
  with pytest.raises(
    config_lib.ConfigError, match=r"optim\.learning_rate: 0\.001 -> 0\.0005"
  ):
    config_lib.check_resumable(old, config_lib.to_json(config_lib.parse(other)))


def test_common_defaults_are_the_ablation_settings():
  """Table 8, first column."""
  config = common.generator()
  assert config.batch.to_dict() == {
    "labels": 64,
    "generated": 64,
    "positives": 64,
    "unconditional": 16,
  }
  assert config.drift.temperatures == (0.02, 0.05, 0.2)
  assert config.drift.affinity_floor == 1e-6
  assert (config.optim.b1, config.optim.b2) == (0.9, 0.95)
  assert config.optim.grad_clip == 2.0
  assert config.guidance.exponent == 3.0


def test_config_files_import_nothing_of_the_package():
  for path in (ROOT / "configs").glob("*.py"):
    assert "drift_jax" not in re.findall(
      r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE
    )
    assert importlib.util.spec_from_file_location("config", path)

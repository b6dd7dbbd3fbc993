"""Rules of what a resumed run may change."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from drift_jax.config.parsing import build
from drift_jax.config.sections import RunConfig
from drift_jax.system import paths, storage
from drift_jax.system.errors import ConfigError

# The resolved config in a run's workdir.
CONFIG_FILE = "config.json"

# Keys that a resumed run may change; any other change is another experiment.
RESUMABLE = (
  "train.num_steps",
  "train.log_every",
  "train.profile",
  "train.keep_compiled",
  "train.kernels",
  "train.accum_labels",
  "train.detached_at_once",
  "model.remat",
  "eval.",
  "checkpoint.",
  "mesh.",
  "processes.",
  "writers",
  "data.data_dir",
  "data.in_memory",
  "data.max_corrupt",
  "data.num_threads",
  "data.num_workers",
  "data.prefetch",
  # They let data pass at the start; no draw depends on them.
  "queue.with_replacement",
  "generator.",
)
# The same of keys that lie deeper: how frozen weights lie on the mesh.
RESUMABLE_ENDS = (".sharding",)
# What the values that rank checkpoints depend on: while a best one is kept,
# a change would compare figures that are not comparable.
RANKING = (
  "checkpoint.best_metric",
  "eval.alphas",
  "eval.classifier.path",
  "eval.dinov2.path",
  "eval.dinov2.reference",
  "eval.ema_decay",
  "eval.inception.path",
  "eval.inception.reference",
  "eval.label_order",
  "eval.labels",
  "eval.num_samples",
  "eval.pixels",
)


def is_run(source: str) -> bool:
  """Whether this is a run's workdir, and no export or weights.

  Raises:
    ConfigError: there is nothing, or a config that can't be read.
    StorageError: a bucket that can't be read.
  """
  if source.startswith(storage.HUB):
    return False
  storage.check(source)
  folder = epath.Path(source)
  if not storage.is_remote(source) and not folder.exists():
    raise ConfigError(
      f"there is no {source}: give the folder of a run, an export or weights, "
      "or hf://NAME"
    )
  file = folder / CONFIG_FILE
  return file.exists() and "task" in storage.read_json(file, dict)


def to_json(config: RunConfig) -> str:
  """Writes the resolved config as JSON with sorted keys."""
  return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)


def completed(written: Mapping[str, Any], like: RunConfig) -> Mapping[str, Any]:
  """Returns a run's written values with defaults for keys that are younger.

  Those of another task's run stay as they are.
  """
  try:
    return json.loads(to_json(build(type(like), written)))
  except ConfigError:
    return written


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flattens a nested dict to {'section.key': value}."""
  flat: dict[str, Any] = {}
  for key, value in values.items():
    if isinstance(value, Mapping) and value:
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def flat_values(text: str) -> dict[str, Any]:
  """Flattens a config's JSON to {'section.key': value}.

  `~` is expanded: earlier versions wrote it as it came.
  """

  def expanded(value: Any) -> Any:
    with contextlib.suppress(paths.PathError):
      return paths.expand_source(value) if isinstance(value, str) else value
    return value

  flat = flatten(json.loads(text))
  return {key: expanded(value) for key, value in flat.items()}


def check_resumable(old: str, new: str) -> None:
  """Raises ConfigError if two configs (JSON) are not the same experiment.

  Keys under RESUMABLE may differ, with three exceptions: train.num_steps where
  the course of the training depends on its end, train.accum_labels where each
  group of labels has scalars of its own, and the keys of RANKING while a best
  checkpoint is kept. The old one must be `completed`.
  """
  before, after = flat_values(old), flat_values(new)
  different = {
    key: f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
    for key in sorted(set(before) | set(after))
    if before.get(key) != after.get(key)
  }
  changed = [
    text
    for key, text in different.items()
    if not key.startswith(RESUMABLE) and not key.endswith(RESUMABLE_ENDS)
  ]
  if changed:
    raise ConfigError(
      "the workdir holds a run with another config; use a new workdir "
      f"(--workdir=DIR) or the old values. Changed: {'; '.join(changed)} (only "
      f"{[*RESUMABLE, *RESUMABLE_ENDS]} may change in a resumed run)"
    )
  if "train.num_steps" in different:
    _check_new_end(different["train.num_steps"], before)
  groups = different.get("train.accum_labels")
  # With scalars of a group 0 and -1 are one: all labels.
  sizes = {max(0, x.get("train.accum_labels", 0)) for x in (before, after)}
  if groups and len(sizes) > 1 and before["train.accum_scalars"] == "group":
    raise ConfigError(
      f"the workdir holds a run with other groups of labels; use a new workdir "
      f"or the old value. Changed: {groups} (a resumed run may change it only "
      "with train.accum_scalars='exact': else the field's scalars are those of "
      "a group)"
    )
  best = before.get("checkpoint.best_metric")
  mixed = [different[key] for key in RANKING if key in different]
  if best and mixed:
    raise ConfigError(
      f"the workdir's best checkpoint is ranked by {best!r}, and figures from "
      "before and after this change can't be compared; use a new workdir or "
      f"the old values. Changed: {'; '.join(mixed)}"
    )


def _check_new_end(change: str, config: Mapping[str, Any]) -> None:
  """Raises ConfigError if training depends on train.num_steps."""
  schedule = config["optim.schedule"]
  reasons = []
  if schedule != "constant":
    reasons.append(
      f"optim.schedule={schedule!r} reaches its end at train.num_steps"
    )
  if fine_tune := config.get("mae.classification_steps"):
    reasons.append(
      f"the last mae.classification_steps={fine_tune} steps train otherwise"
    )
  if reasons:
    raise ConfigError(
      f"the workdir holds a run of another length; use a new workdir or the "
      f"old value. Changed: {change} (a resumed run may change it only where "
      f"nothing else depends on it, but {' and '.join(reasons)})"
    )

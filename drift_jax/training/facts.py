"""Facts that identify a run's data: recorded at its start, compared later.

In a run that is resumed, data position, queue and class embeddings refer to the
images that it began with, in their order, by their labels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from drift_jax import config as config_lib
from drift_jax.data.order import check_labels
from drift_jax.data.sources import ONE_CLASS, labels_sha256, names_sha256
from drift_jax.system import storage

CLASSES_FILE = "classes.json"
DATA_FILE = "data.json"
# JSON by name. No fact says where the data lie, so that they can be moved.
Facts = Mapping[str, Any]
_COUNTS = "images_of_class"
# Meaning of a changed checksum if nothing that can be counted has changed.
_CHECKSUMS = {
  "labels_sha256": "their labels come in another order",
  "names_sha256": "their files have other names or another order",
  "values_sha256": "their values are others",
  "conditions_sha256": "their conditions are others",
}
_LISTED = 3


def image_facts(kind: str, source: Any) -> Facts:
  """Returns the facts of labelled images.

  Args:
    kind: kind of the source, e.g. 'folder'.
    source: training images, a Source or a LatentReader; none is read.

  Raises:
    ValueError: a label without a class name.
  """
  check_labels(source.labels, source.class_names)
  counts = np.bincount(source.labels, minlength=len(source.class_names))
  return {
    "kind": kind,
    "images": len(source.labels),
    _COUNTS: counts.tolist(),
    "labels_sha256": labels_sha256(source.labels),
    "names_sha256": names_sha256(source),
  }


def recorded(path: epath.Path) -> tuple[list[str], Facts]:
  """Reads class names and facts of a workdir; empty if it has none yet.

  Raises:
    ConfigError: a damaged file.
  """
  names, facts = path / CLASSES_FILE, path / DATA_FILE
  return (
    storage.read_json(names, list) if names.exists() else [],
    storage.read_json(facts, dict) if facts.exists() else {},
  )


def differences(
  names_before: Sequence[str],
  before: Facts,
  class_names: Sequence[str],
  facts: Facts,
) -> list[str]:
  """Tells how data differ from earlier ones; unknown facts are not compared.

  Args:
    names_before, before: class names by label and facts of the earlier data.
    class_names, facts: those of the data.
  """
  found: list[str] = []
  if class_names and names_before:
    found += renamed(names_before, class_names)
  differ = [
    key
    for key, value in facts.items()
    if before.get(key) and value and before[key] != value
  ]
  for key in differ:
    if key == _COUNTS:
      found += _recounted(before[key], facts[key], class_names)
    elif key not in _CHECKSUMS:
      found.append(f"{key}: {before[key]}, now {facts[key]}")
  return found or [_CHECKSUMS[key] for key in differ]


def is_same_data(
  names_before: Sequence[str],
  before: Facts,
  class_names: Sequence[str],
  facts: Facts,
) -> bool:
  """Returns whether data are known to be the earlier ones, wherever they lie.

  Latents have no names; a run's are those of its autoencoder.
  """
  keys = ["names_sha256", "values_sha256"]
  if facts.get("kind") == "latents":
    keys.append("labels_sha256")
  is_known = any(
    before.get(key) and before[key] == facts.get(key) for key in keys
  )
  return is_known and not differences(names_before, before, class_names, facts)


def check_data(
  path: epath.Path, class_names: Sequence[str], facts: Facts
) -> None:
  """Raises ConfigError if data are not those that the run began with."""
  found = differences(*recorded(path), class_names, facts)
  if found:
    raise config_lib.ConfigError(
      f"data: the run in {path} began with other data ({'; '.join(found)}): "
      "give it those again or use a new workdir"
    )


def check_same_data(paths: Sequence[epath.Path]) -> None:
  """Raises ConfigError if runs in some workdirs were trained on other data."""
  known = [
    (path, names, facts)
    for path in paths
    for names, facts in [recorded(path)]
    if facts
  ]
  for path, names, facts in known[1:]:
    first, names_of_first, facts_of_first = known[0]
    found = differences(names_of_first, facts_of_first, names, facts)
    if found:
      raise config_lib.ConfigError(
        f"{path} was trained on other data than {first} ({'; '.join(found)}), "
        "which a table can't compare: train one of them anew"
      )


def renamed(before: Sequence[str], now: Sequence[str]) -> list[str]:
  """Tells how class names differ, by label.

  Earlier versions named the one class of DIR/train/FILE by its folder.
  """
  if (*before, *now) == ("train", ONE_CLASS):
    return []
  if len(before) == len(now):
    return _listed(
      f"class {label} was {old!r}, now {new!r}"
      for label, (old, new) in enumerate(zip(before, now, strict=True))
      if old != new
    )
  text = f"{len(before)} classes, now {len(now)}"
  for names, others, what in ((now, before, "new"), (before, now, "gone")):
    known = set(others)
    only = [repr(name) for name in names if name not in known]
    if only:
      text += f", {what}: {', '.join(_listed(only))}"
  return [text]


def _recounted(
  before: Sequence[int], now: Sequence[int], class_names: Sequence[str]
) -> list[str]:
  if len(before) != len(now):
    return []
  return _listed(
    f"class {label} ({class_names[label]}) had {old} images, now {new}"
    for label, (old, new) in enumerate(zip(before, now, strict=True))
    if old != new
  )


def _listed(texts: Any) -> list[str]:
  """Keeps the first few, and says how many more there are."""
  texts = list(texts)
  more = len(texts) - _LISTED
  return texts[:_LISTED] + [f"{more} more like that"] * (more > 0)

"""Puts an export on the hub with a model card: see drift_jax.tools.export."""

import contextlib
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import huggingface_hub
import numpy as np
from etils import epath

import drift_jax
from drift_jax.system import hub, paths, storage
from drift_jax.system.console import logger
from drift_jax.system.errors import ConfigError, one_line
from drift_jax.tools.work import export, rows
from drift_jax.training import on_hub
from drift_jax.training.artifacts import MANIFEST_FILE, RUN_CONFIG_FILE

CARD, GRID = "README.md", "samples.png"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# The hub makes it in every repository.
_ITS_OWN = {".gitattributes"}
# Keys of an export's JSON files under which there may be paths; what such a
# path is, and KIND:PATH of a data set.
_WITH_PATHS = ("provenance", "source", "options")
_ABSOLUTE = re.compile(r"(?P<kind>(?:\w+:)?)/(?!/)(?:.*/)?(?P<name>[^/]+)/*")
# Images larger than this (pixels) are shown in a smaller grid.
_SMALL = 64
_NAMED = 10  # classes on the card


def check(repository: str) -> None:
  """Raises ConfigError for no name of a repository, and without a token."""
  if not _REPOSITORY.fullmatch(repository):
    raise ConfigError(f"--push={repository}: want OWNER/NAME of a repository")
  if not huggingface_hub.get_token():
    raise ConfigError(
      f"--push={repository} needs a token that may write there: hf auth login, "
      "or set HF_TOKEN (https://huggingface.co/settings/tokens)"
    )


def check_export(folder: str, source: str, options: Mapping[str, Any]) -> None:
  """Checks that a folder holds the export that is asked for, and says so.

  Args:
    folder: which is there.
    source: of the export; '' for any.
    options: of export.export, those that are given.

  Raises:
    ConfigError: no export, or that of something else or with other options.
  """
  manifest = _read_manifest(folder)
  made_of = manifest["provenance"]
  before = made_of.get("workdir", made_of.get("weights"))
  if source and export.absolute(source) != export.absolute(before):
    raise ConfigError(
      f"--out={folder} is there already, as the export of {before}, not of "
      f"{source}: give another folder"
    )
  known = {**manifest, **manifest.get("options", {})}
  for name, value in export.as_recorded(options).items():
    if name not in known or known[name] != value:
      raise ConfigError(
        f"--{name}: --out={folder} is there already and was not made with "
        f"{value!r}: leave the flag out to push it as it is, or give another "
        "folder"
      )
  logger.info("%s is there already: it is pushed as it is.", folder)


def _read_manifest(folder: str) -> dict[str, Any]:
  file = pathlib.Path(folder, MANIFEST_FILE)
  try:
    found = on_hub.parse_manifest(file.read_text())
    if found is None:
      raise ValueError("another program's")
  except (OSError, ValueError) as error:
    raise ConfigError(
      f"--out={folder} is there already and is no export that could be pushed "
      f"({file}: {one_line(error)}): give another folder"
    ) from error
  return found


def push(
  folder: str, repository: str, *, private: bool = False, license: str = ""
) -> str:
  """Pushes an export; returns the address that drift_jax.load takes.

  A model card and a grid of samples are added to the folder, unless they are
  there. Of paths on this machine, only the last names are pushed. What an
  interrupted push has left on the hub is not sent again.

  Args:
    folder: of the export.
    repository: 'OWNER/NAME', which is made if it isn't there.
    private: whether nobody else may see it.
    license: for the card; a name that the hub knows; '' for unknown.

  Raises:
    ConfigError: no export, a card with another license, no token or no right,
      or a repository that holds something else.
  """
  check(repository)
  manifest = _read_manifest(folder)
  # 1. The card
  path = pathlib.Path(folder)
  if not (path / GRID).exists():
    if manifest.get("conditions"):
      raise ConfigError(
        f"--push={repository}: {path / GRID}, which the card shows, needs "
        f"conditions: python -m drift_jax.sample --from={folder} --conditions="
        f"FILE.npz --out={path / GRID} draws it; then push again"
      )
    _draw(path)
  card = path / CARD
  if not card.exists():
    text = _card(repository, manifest, license or "unknown")
    card.write_text(text, encoding="utf-8")
  elif license and f"license: {license}\n" not in card.read_text(
    encoding="utf-8"
  ):
    raise ConfigError(
      f"--license={license}: {card} is there already and does not say so: "
      "change it there, and leave the flag out"
    )
  # 2. The repository
  api = huggingface_hub.HfApi(library_name="drift_jax")
  found = [
    pathlib.Path(place, name)
    for place, names in paths.walk(folder)
    for name in names
  ]
  files = {file.relative_to(path).as_posix(): file for file in found}
  shortened = _without_places(path, manifest)
  with _one_line(repository):
    api.create_repo(repository, private=private, exist_ok=True)
    there = api.model_info(repository)
  _check_there(repository, there, private, files)
  # 3. The files
  logger.info(
    "Pushing %s to %s, %s: %d files, %s.",
    folder,
    repository,
    "private" if there.private else "public",
    len(files),
    hub.in_bytes(sum(file.stat().st_size for file in files.values())),
  )
  with _one_line(repository):
    api.create_commit(
      repository,
      [
        huggingface_hub.CommitOperationAdd(name, shortened.get(name, str(file)))
        for name, file in files.items()
      ],
      commit_message=f"Export of drift_jax {drift_jax.__version__}",
    )
  return f"hf://{repository}"


@contextlib.contextmanager
def _one_line(repository: str) -> Iterator[None]:
  """Makes a ConfigError of whatever the hub's library raises."""
  try:
    yield
  # Its errors have no base in common.
  except Exception as error:
    cause = error.__cause__  # of an upload's
    why = f" ({one_line(cause)})" if cause is not None else ""
    raise ConfigError(
      f"--push={repository}: {one_line(error)}{why}; if the token may write "
      "there, the same command goes on"
    ) from None


def _check_there(
  repository: str,
  there: Any,
  private: bool,
  files: Mapping[str, pathlib.Path],
) -> None:
  """Raises ConfigError for a repository that the export may not go to."""
  if private and not there.private:
    raise ConfigError(
      f"--push={repository} --private: the repository is there and is public: "
      "change that in its settings, or take another name"
    )
  names = {file.rfilename for file in there.siblings or ()} - _ITS_OWN
  others = names - files.keys()
  if others and MANIFEST_FILE not in names:
    raise ConfigError(
      f"--push={repository}: the repository holds something else "
      f"({', '.join(sorted(others)[:3])}): take another name"
    )


def _without_places(
  path: pathlib.Path, manifest: Mapping[str, Any]
) -> dict[str, bytes]:
  """{file: its bytes} of files that hold paths, with their last names alone.

  The manifest, which is one of them, has the checksums of the others.
  """
  pushed: dict[str, bytes] = {}
  known = dict(manifest["files"])
  for name in known:
    if name.endswith(".json"):
      values = storage.read_json(epath.Path(path / name), dict)
      values = _shortened(values, name == RUN_CONFIG_FILE)
      pushed[name] = data = json.dumps(values, indent=1).encode()
      digest = hashlib.sha256(data).hexdigest()
      known[name] = {"bytes": len(data), "sha256": digest}
  values = {**_shortened(manifest), "files": known}
  return {**pushed, MANIFEST_FILE: json.dumps(values, indent=1).encode()}


def _shortened(value: Any, here: bool = False, key: str = "") -> Any:
  """Replaces absolute paths by their last names, under some keys or `here`."""
  here = here or key in _WITH_PATHS
  if isinstance(value, dict):
    return {k: _shortened(v, here, k) for k, v in value.items()}
  if isinstance(value, list):
    return [_shortened(each, here) for each in value]
  is_path = here and isinstance(value, str) and _ABSOLUTE.fullmatch(value)
  return is_path.expand(r"\g<kind>\g<name>") if is_path else value


def _draw(path: pathlib.Path) -> None:
  """Draws a grid of samples: a few images of some classes, seed 0."""
  model = drift_jax.load(path)
  is_small = max(model.image_shape) <= _SMALL
  classes, count = (10, 8) if is_small else (4, 4)
  shown = min(classes, model.num_classes)
  chosen = np.linspace(0, model.num_classes - 1, shown, dtype=np.int32)
  model.sample(chosen, count=count, alpha=model.alpha_range[0]).save(
    path / GRID
  )


def _card(repository: str, manifest: Mapping[str, Any], license: str) -> str:
  """The model card: YAML, a picture, how to use it, facts and figures."""
  low, high = manifest["alpha_range"]
  names = manifest["class_names"] or ()
  more = ", ..." * (len(names) > _NAMED)
  files, functions = manifest["files"], manifest["functions"]
  given = ", condition=conditions" if manifest.get("conditions") else ""
  flag = " --conditions FILE.npz" if given else ""
  size = sum(files[file]["bytes"] for file in manifest["weights"].values())
  facts = {
    "images": functions["sample"]["result"] if functions else None,
    "classes": manifest["num_classes"],
    "conditions": f"[{', '.join(map(str, manifest['conditions']))}]"
    if given
    else None,
    "their names": ", ".join(names[:_NAMED]) + more or None,
    "guidance scale alpha": f"{low:g} to {high:g}",
    "training steps": manifest["step"],
    "average of the weights": manifest["ema_decay"],
    "computed in": manifest["dtype"],
    "weights": hub.in_bytes(size),
  }
  known = [(k, v) for k, v in facts.items() if v is not None]
  figures, tail = manifest.get("figures"), ""
  if figures:
    real = figures["real"]
    lines = [
      (name, f"{value:.4g}", _real(name, real))
      for name, value in figures["generated"].items()
    ]
    table = rows.markdown(("figure", "generated", "real images"), lines)
    tail += f"\n## Figures\n\nOf these weights, by the run itself:\n\n{table}\n"
  if RUN_CONFIG_FILE in files:
    tail += f"\nHow it was trained: [{RUN_CONFIG_FILE}]({RUN_CONFIG_FILE}).\n"
  return f"""---
library_name: drift_jax
license: {license}
pipeline_tag: unconditional-image-generation
tags:
- drift_jax
- drifting
- image-generation
- jax
---

# {repository.partition("/")[2]}

A one-step image generator, trained by drifting
([arXiv:2602.04770](https://arxiv.org/abs/2602.04770)) with drift_jax.

![Samples, one row for each class, alpha {low:g}, seed 0]({GRID})

## Use

```python
import drift_jax

model = drift_jax.load("hf://{repository}")
model.sample([0]{given}, count=8, alpha={low:g}, seed=0).show()
```

Without drift_jax, with jax and numpy alone, in a copy of this repository:

```bash
python run.py --labels 0{flag} --count 8 --alpha {low:g} --seed 0 --out grid.png
```

## Facts

{rows.markdown(("", ""), known)}
{tail}"""


def _real(name: str, real: Mapping[str, float]) -> str:
  """The figure of real images beside a generator's at some alpha."""
  value = real.get(name.partition("/alpha_")[0])
  return "" if value is None else f"{value:.4g}"

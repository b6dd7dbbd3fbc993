"""Data sets on the Hugging Face hub: which files there are, and these files.

They are downloaded into the hub library's own cache, whole and once for all
processes of a machine. The list of a commit's files is kept beside that cache,
so that nobody takes a part of a data set for all of it when the hub is not
reached.
"""

import glob
import json
import pathlib
import urllib.parse
from collections.abc import Sequence
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import constants, errors

from drift_jax.data.files import replacing
from drift_jax.system import console, hub, paths
from drift_jax.system.errors import one_line

# Start of an address.
DATASETS = "hf://datasets/"


class Dataset(NamedTuple):
  """The files of a data set at one commit: {path: bytes}."""

  repository: str
  commit: str
  files: dict[str, int]

  def __str__(self) -> str:
    return f"{DATASETS}{self.repository}@{self.commit}"


def list_dataset(repository: str, revision: str | None) -> Dataset:
  """The files that the hub has, or had when it was last reached.

  Raises:
    HubError: no such data set or revision, or none that this user may see; not
      reached and not in the cache.
  """
  hub.check_endpoint()
  name = f"{repository}@{revision or constants.DEFAULT_REVISION}"
  file = paths.user_cache() / "hub" / urllib.parse.quote(f"{name}.json", "@")
  known = _kept(file)
  if known is not None and known.commit == revision:
    return known
  try:
    info = huggingface_hub.HfApi().dataset_info(
      repository, revision=revision, files_metadata=True
    )
  except Exception as error:  # The library's own classes have no base.
    known = (
      None if _is_answer(error) else known or _downloaded(repository, revision)
    )
    if known is None:
      reason = _reason(error, repository, revision)
      raise hub.HubError(f"{DATASETS}{name}: {reason}") from None
    why = one_line(error)
    console.logger.info("%s is taken from the cache: %s", known, why)
    return known
  files = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
  dataset = Dataset(repository, info.sha or "", files)
  file.parent.mkdir(parents=True, exist_ok=True)
  with replacing(file) as temporary:
    temporary.write_text(json.dumps(dataset._asdict()))
  return dataset


def _is_answer(error: Exception) -> bool:
  """Whether the hub has refused; not if it is out of order or overloaded."""
  if isinstance(error, errors.HfHubHTTPError):
    status = error.response.status_code
    return status < 500 and status != 429
  return isinstance(error, ValueError)


def _kept(file: pathlib.Path) -> Dataset | None:
  """The list of before; None if there is none, or a damaged one."""
  try:
    return Dataset(**json.loads(file.read_bytes()))
  except (OSError, ValueError, TypeError):
    return None


def _downloaded(repository: str, revision: str | None) -> Dataset | None:
  """Lists a whole copy that another program left in the cache; else None."""
  try:
    folder = pathlib.Path(
      huggingface_hub.snapshot_download(
        repository,
        repo_type="dataset",
        revision=revision,
        allow_patterns="*.parquet",
        local_files_only=True,
      )
    )
  except errors.LocalEntryNotFoundError:
    return None
  files = {
    path.relative_to(folder).as_posix(): path.stat().st_size
    for path in folder.rglob("*.parquet")
  }
  return Dataset(repository, folder.name, files)


def _cached(dataset: Dataset, name: str) -> str | None:
  """Where the hub's cache has a file."""
  path = huggingface_hub.try_to_load_from_cache(
    dataset.repository, name, revision=dataset.commit, repo_type="dataset"
  )
  return path if isinstance(path, str) else None


def _missing(dataset: Dataset, names: Sequence[str]) -> list[str]:
  return [name for name in names if not _cached(dataset, name)]


def need(dataset: Dataset, names: Sequence[str]) -> hub.Need:
  """Sums the files that are still to be downloaded."""
  missing = _missing(dataset, names)
  what = f"{len(missing)} of {len(names)} files of {dataset}"
  size = sum(dataset.files[name] for name in missing)
  return hub.Need(what, size, hub.downloads())


def fetch_dataset(dataset: Dataset, names: Sequence[str]) -> list[pathlib.Path]:
  """Some files in the hub's cache; those that are missing are downloaded.

  The processes of a machine wait for each other, and each file comes once. A
  download that was interrupted goes on. Says before how much comes.

  Raises:
    hub.HubError: not reached, no space, or not the bytes that the hub names the
      files by.
  """
  missing = _missing(dataset, names)
  if missing:
    lacking = need(dataset, names)
    text = hub.listed([lacking])
    hub.require_space([lacking])
    console.logger.info("Downloading %s to %s", text, lacking.folder)
    try:
      huggingface_hub.snapshot_download(
        dataset.repository,
        repo_type="dataset",
        revision=dataset.commit,
        allow_patterns=[glob.escape(name) for name in missing],
      )
    except Exception as error:  # The library's own classes have no base.
      reason = _reason(error, dataset.repository, dataset.commit)
      raise hub.HubError(f"{text} are not there: {reason}") from None
  found = [pathlib.Path(str(_cached(dataset, name))) for name in names]
  for name, path in zip(names, found, strict=True):
    if name in missing:
      stat = path.stat()
      hub.check_sum(path, stat.st_size, stat.st_mtime_ns)
  return found


def _reason(error: Exception, repository: str, revision: str | None) -> str:
  """Why a data set can't be had, and what to do."""
  sign_in = "`hf auth login`, or set HF_TOKEN"
  if isinstance(error, errors.GatedRepoError):
    page = f"{constants.ENDPOINT}/datasets/{repository}"
    return f"it is gated: accept its conditions on {page}, then {sign_in}"
  if isinstance(error, errors.RepositoryNotFoundError):
    return f"the hub has no such data set, or it is private: {sign_in}"
  if isinstance(error, errors.RevisionNotFoundError):
    return f"it has no revision {revision!r}"
  return f"{one_line(error)}{hub.variables()}"

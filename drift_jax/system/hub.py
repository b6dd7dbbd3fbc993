"""Files on the Hugging Face hub: hf://OWNER/NAME[@REVISION][/PATH].

They are downloaded into the hub library's own cache, once, and checked there
each time. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are respected. What
is made of them is kept beside that cache.
"""

import functools
import hashlib
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import constants, errors

from drift_jax.system.errors import one_line

_ADDRESS = re.compile(
  r"hf://(?P<repository>[^/@]+/[^/@]+)"
  r"(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?"
  r"(?:/(?P<path>.+))?"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


class HubError(OSError):
  """A file that can't be had from the hub; the message says why."""


class Address(NamedTuple):
  """A repository, or a path in it; revision None is its newest, path '' all."""

  repository: str
  revision: str | None
  path: str


def parse(source: str) -> Address | None:
  """The parts of hf://OWNER/NAME[@REVISION][/PATH]; None if it isn't one."""
  match = _ADDRESS.fullmatch(source)
  if match is None:
    return None
  return Address(match["repository"], match["revision"], match["path"] or "")


class Remote(NamedTuple):
  """A file that a repository has.

  Attributes:
    address: of the file, its revision a commit.
    size: of the file, in bytes.
    missing: bytes that are not in the cache; 0 if the file is there.
  """

  address: Address
  size: int
  missing: int


class Need(NamedTuple):
  """Bytes that are about to be written to a folder, and what they are."""

  what: str
  size: int
  folder: pathlib.Path


def find(address: Address) -> Remote | None:
  """Looks for a file, downloading nothing; None if there is no such file.

  Raises:
    HubError: not reached and not in the cache, no such repository or revision.
  """
  found = _asked(address, dry_run=True)
  if found is None:
    return None
  size = found.file_size or 0
  missing = size if found.will_download else 0
  return Remote(address._replace(revision=found.commit_hash), size, missing)


def fetch(address: Address) -> pathlib.Path | None:
  """The file in the hub's cache; None if the repository has no such file.

  Raises:
    HubError: not reached and not in the cache, no such repository or revision,
      no space for it, or not the bytes that the hub names the file by.
  """
  found = find(address)
  if found is None:
    return None
  require_space([Need(address.path, found.missing, downloads())])
  path = _asked(address, dry_run=False)
  if path is None:
    return None
  path = pathlib.Path(path)
  stat = path.stat()
  check_sum(path, stat.st_size, stat.st_mtime_ns)
  return path


def _asked(address: Address, *, dry_run: bool) -> Any:
  """Asks the hub's library for a file: its path, or what a download would do.

  None if the repository has no such file.
  """
  repository, revision, name = address
  check_endpoint()
  download: Callable[..., Any] = huggingface_hub.hf_hub_download
  unreached = _unreached()
  try:
    return download(
      repository,
      name,
      revision=revision,
      dry_run=dry_run,
      local_files_only=bool(unreached),
    )
  except errors.RemoteEntryNotFoundError:
    return None
  except Exception as error:  # The library's own classes have no base.
    if _is_known_to_lack(address, error):
      return None
    text = f"{name}: {one_line(error)}"
    if unreached and isinstance(error, errors.LocalEntryNotFoundError):
      text = (
        f"{unreached}, and {name} is not in the cache (HF_HOME); once loaded "
        "it needs no network"
      )
    raise HubError(f"{text}{variables()}") from None


def _unreached() -> str:
  """Says that the hub can't be reached, and why; '' if it answers.

  The library would try to reach it for half a minute, for each file.
  """
  try:
    if not huggingface_hub.is_offline_mode():
      _reach(constants.ENDPOINT)
  except Exception as error:  # those of a client, of TLS, of names
    host = constants.ENDPOINT.partition("://")[2]
    reason = re.sub(r"^\[Errno -?\d+\] ", "", one_line(error))
    return f"{host} cannot be reached ({reason})"
  return ""


@functools.cache  # of an answer, not of an error
def _reach(endpoint: str) -> None:
  """Asks the hub for anything, once."""
  session = huggingface_hub.get_session()
  session.head(endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT)


def downloads() -> pathlib.Path:
  """The folder of the hub library's downloads."""
  return pathlib.Path(constants.HF_HUB_CACHE)


def require_space(needs: Sequence[Need]) -> None:
  """Raises HubError for a disk that can't take all that goes to it."""
  on_disk: dict[int, list[Need]] = {}
  for need in needs:
    device = os.stat(_existing(need.folder)).st_dev
    on_disk.setdefault(device, []).append(need)
  for group in on_disk.values():
    folder = group[0].folder
    free = shutil.disk_usage(_existing(folder)).free
    if sum(need.size for need in group) > free:
      raise HubError(
        f"{listed(group)} do not fit: {folder} has {in_bytes(free)} free; free "
        "some, or set HF_HOME (XDG_CACHE_HOME, if it is set) to a folder on a "
        "larger disk"
      )


def _existing(folder: pathlib.Path) -> pathlib.Path:
  """The folder, or the nearest one above it that exists."""
  return next(p for p in (folder, *folder.absolute().parents) if p.exists())


def listed(needs: Sequence[Need]) -> str:
  """WHAT (SIZE) of each that is not empty."""
  return ", ".join(
    f"{need.what} ({in_bytes(need.size)})" for need in needs if need.size
  )


def in_bytes(size: int) -> str:
  """A number of bytes for people: '1.85 GB', '335 MB', '2 kB'."""
  for unit, name in ((10**9, "GB"), (10**6, "MB")):
    if size >= unit:
      return f"{size / unit:.3g} {name}"
  return f"{size / 1000:.3g} kB"


def _is_known_to_lack(address: Address, error: BaseException) -> bool:
  """Whether the cache knows from before that there is no such file."""
  if not isinstance(error, errors.LocalEntryNotFoundError):
    return False
  cached = huggingface_hub.try_to_load_from_cache(
    address.repository, address.path, revision=address.revision
  )
  return cached is not None and not isinstance(cached, str)


def check_endpoint() -> None:
  """Raises HubError for an address that no request can be sent to."""
  if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
    return
  endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
  if not re.fullmatch(r"https?://[!-~]+", endpoint):
    host = endpoint.rpartition("://")[2].strip("/") or "huggingface.co"
    raise HubError(
      f"HF_ENDPOINT={endpoint!r} is no address of a hub: want a URL, such as "
      f"https://{host}"
    )


def variables() -> str:
  """Names of the variables that decide how the hub is asked."""
  names = [
    name
    for name in sorted(os.environ)
    if name.startswith("HF_") or name.lower().endswith("_proxy")
  ]
  return f" (it depends on {', '.join(names)})" if names else ""


def commit_of(path: pathlib.Path, name: str) -> str:
  """The commit that a fetched file is of: FOLDER/snapshots/COMMIT/NAME."""
  return path.parents[len(pathlib.PurePosixPath(name).parts) - 1].name


def sha256_of(path: pathlib.Path) -> str | None:
  """The SHA-256 that `fetch` compared; None of a file that has another name."""
  name = path.resolve().name
  return name if _SHA256.fullmatch(name) else None


def folders(address: Address) -> list[str]:
  """Folders of a repository, sorted; none if it can't be asked."""
  try:
    names = huggingface_hub.list_repo_files(
      address.repository, revision=address.revision
    )
  # The library's errors have no base. The list is only a hint in the message of
  # another error.
  except Exception:
    return []
  return sorted(
    {str(pathlib.PurePosixPath(name).parent) for name in names} - {"."}
  )


@functools.cache  # a file that has not changed is not summed again
def check_sum(path: pathlib.Path, size: int, changed: int) -> None:
  """Raises HubError unless the bytes are those that the file is named by.

  The cache holds a link to a file whose name is its content's: the SHA-256 of a
  large file, git's SHA-1 of a small one.
  """
  del changed
  blob = path.resolve()
  if _SHA256.fullmatch(blob.name):
    digest = hashlib.sha256()
  elif _SHA1.fullmatch(blob.name):
    digest = hashlib.sha1(b"blob %d\0" % size)
  else:
    return  # a cache without links, on a file system that has none
  with blob.open("rb") as file:
    checksum = hashlib.file_digest(file, lambda: digest).hexdigest()
  if checksum != blob.name:
    raise HubError(
      f"{path} ({size} bytes) is damaged: its checksum is "
      f"{checksum}, not {blob.name}; remove {blob} and try again"
    )

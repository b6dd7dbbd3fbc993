"""One run at a time in a workdir, one report at a time in a file."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from etils import epath

from drift_jax.system import exits, paths, processes, storage
from drift_jax.system.lease import Lease
from drift_jax.training.workdir import check_workdir

LOCK_FILE = "run.lock"
_Train = TypeVar("_Train", bound=Callable[..., Any])


def alone(train: _Train) -> _Train:
  """Makes a task's (config, workdir) -> state the only run in its workdir.

  It raises ConfigError before anything is read or written if another run is
  going on there, or the workdir can't be written. A run that was not heard of
  for a minute may lose the workdir to another one: its process ends then.
  """

  @functools.wraps(train)
  def run(config: Any, workdir: str, **options: Any) -> Any:
    workdir = paths.expand(workdir)
    check_workdir(workdir)
    with holding(epath.Path(workdir) / LOCK_FILE, f"--workdir={workdir}"):
      return train(config, workdir, **options)

  return cast(_Train, run)


@contextlib.contextmanager
def alone_with(out: str) -> Iterator[None]:
  """Keeps a file to be written, --out, for one program at a time.

  Raises:
    ConfigError: another process is about to write it.
    StorageError: a bucket that can't be used.
  """
  storage.check(out)
  path = epath.Path(f"{out}.lock")
  with contextlib.ExitStack() as stack:
    # It makes no folder: a program that fails would leave it.
    if processes.from_first(path.parent.exists):
      stack.enter_context(holding(path, f"--out={out}"))
    yield


@contextlib.contextmanager
def holding(path: epath.Path, what: str) -> Iterator[None]:
  """Holds a lease meanwhile, the first process for all.

  Args:
    path: file or object of the lease.
    what: the thing that it is for, in messages.

  Raises:
    ConfigError: another process holds it.
    PeerError: the same, in the other processes.
    StorageError: it can't be read or written.
  """
  lease = Lease(path, what, exits.give_up)
  with exits.last(lease.release):
    try:
      processes.from_first(lease.take)
      yield
    finally:
      lease.release()

"""What all programs share, from their flags to their exit codes.

A program checks its flags before it imports anything heavy: --help and mistakes
cost nothing.
"""

import argparse
import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from drift_jax.system import console, lazy
from drift_jax.system.errors import ERRORS, UserError

# glibc's settings; the one of large pages, and the first glibc that has it.
_TUNABLES = "GLIBC_TUNABLES"
_LARGE_PAGES = "glibc.malloc.hugetlb"
_GLIBC = (2, 35)
_MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def parser(module: str, doc: str | None) -> console.Parser:
  """A parser of the flags of `python -m MODULE`, described by its docstring."""
  description, _, details = (doc or "").partition("\n")
  return console.Parser(
    prog=f"python -m {module}",
    description=description,
    epilog=details,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


@contextlib.contextmanager
def checking(argv: Sequence[str] = ()) -> Iterator[None]:
  """Ends the program with one line for an error that its flags show.

  Args:
    argv: the program's name and what is no flag; there must be none.
  """
  if argv[1:]:
    sys.exit(f"Error: unexpected arguments {list(argv[1:])} (see --help)")
  try:
    yield
  except ERRORS as error:
    sys.exit(f"Error: {error}")


def setup() -> None:
  """Sets up memory, messages and JAX; imports JAX."""
  ask_for_large_pages()
  from drift_jax.system import numerics

  console.setup()
  numerics.pin()


def run(
  program: Callable[[], None],
  *,
  processes: Sequence[Any] | None = None,
  resumes: bool = False,
  errors: tuple[type[Exception], ...] = (),
  workdir: str = "",
  keep_compiled: bool = True,
  **timeouts: int,
) -> None:
  """Runs a program and ends its process with the code that says how it went.

  Args:
    program: imports what is heavy, then works.
    processes: coordinator, num_processes and process_id, see `exits.join`; None
      for a program that works alone.
    resumes: whether the same command continues from what is on the disk.
    errors: that end it with their message, beside `errors.ERRORS`.
    workdir, keep_compiled: where compiled programs may stay, and whether they
      do; see `numerics.keep_compiled`.
    **timeouts: see `exits.join`.
  """
  with checking(), lazy.needs():
    setup()
    from drift_jax.system import exits, numerics

  again = exits.AGAIN if resumes else exits.ANEW

  def joined() -> None:
    if processes is not None:
      exits.join(*processes, again=again, **timeouts)
    if keep_compiled:
      numerics.keep_compiled(workdir)
    if resumes:
      exits.stop_on_sigterm()
    try:
      with lazy.needs():
        program()
    except errors as error:
      raise UserError(str(error)) from error

  exits.run(joined, again=again)


def tunables(variables: Mapping[str, str], mode: str, libc: str) -> str:
  """GLIBC_TUNABLES that ask for large pages; '' if there is nothing to ask.

  Args:
    variables: the environment; what it says of large pages stays as it is.
    mode: what Linux says of them; it gives them on request in '[madvise]'.
    libc: name and version of the C library.
  """
  given = variables.get(_TUNABLES, "")
  name, _, version = libc.partition(" ")
  if "[madvise]" not in mode or name != "glibc" or _LARGE_PAGES in given:
    return ""
  if tuple(int(part) for part in version.split(".")[:2]) < _GLIBC:
    return ""
  return ":".join(filter(None, [given, f"{_LARGE_PAGES}=1"]))


def ask_for_large_pages() -> None:
  """Starts this program anew with pages of 2 MB, where Linux gives them so.

  A step's arrays on a CPU are new memory, which Linux empties page by page
  (docs/performance.md). glibc reads its variable when a process starts. Only
  python -m drift_jax.NAME starts anew, not a process that imports what it
  calls.
  """
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  name = spec.name.removesuffix(".__main__") if spec else ""
  command = ["-m", name, *sys.argv[1:]]
  ours = name.startswith("drift_jax.")
  if not ours or sys.orig_argv[-len(command) :] != command:
    return
  if value := tunables(os.environ, _mode(), _libc()):
    os.environ[_TUNABLES] = value
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)


def _mode() -> str:
  """Linux's setting of large pages; '' on other systems."""
  try:
    return _MODE.read_text()
  except OSError:
    return ""


def _libc() -> str:
  """Name and version of the C library; '' of others than glibc."""
  try:
    return os.confstr("CS_GNU_LIBC_VERSION") or ""
  except (AttributeError, ValueError):
    return ""

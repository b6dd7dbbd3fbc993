"""What all programs share, from their flags to their exit codes.

A program checks its flags before it imports anything heavy: --help and mistakes
cost nothing.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from drift_jax.system import console, lazy
from drift_jax.system.errors import ERRORS, UserError


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
  """Sets up messages and JAX; imports JAX."""
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

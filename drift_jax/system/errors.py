"""The errors that end a program with one line."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


class UserError(Exception):
  """Base of all errors whose message says what is wrong and what to do."""


class ConfigError(UserError, ValueError):
  """A config that can't be run; the message names key, value and remedy."""


class DataError(UserError, ValueError):
  """Data that are damaged, missing or not what was asked for.

  The message names what, where and the remedy.
  """


class EvaluationError(UserError, ValueError):
  """Samples that can't be judged; the message says which and why."""


# Characters of another library's message.
_MAX_FAILURE = 300
# Errors that end a program with their message alone. The message of an OSError
# has the path of the file.
ERRORS = (UserError, OSError)


@contextlib.contextmanager
def naming(section: str) -> Iterator[None]:
  """Turns a constructor's ValueError into a ConfigError of the section."""
  try:
    yield
  except ValueError as error:
    if isinstance(error, ConfigError):
      raise
    text = str(error)
    if not text.startswith(f"{section}."):  # a key names the section already
      text = f"{section}: {text}"
    raise ConfigError(text) from error


def results_of(*calls: Callable[[], Any]) -> list[Any]:
  """What each call returns, or one error that holds those of all calls.

  Raises:
    UserError: that of the only call that fails; a ConfigError of several.
  """
  results, found = [], []
  for call in calls:
    try:
      results.append(call())
    except UserError as error:
      found.append(error)
  if len(found) == 1:
    raise found[0]
  if found:
    raise ConfigError("; ".join(map(str, found)))
  return results


def one_line(error: BaseException) -> str:
  """Another library's message, on one line of bounded length."""
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= _MAX_FAILURE else f"{text[:_MAX_FAILURE]}..."

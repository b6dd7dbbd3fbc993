"""A program that is called many times in one process, as its start is slow."""

import json
from collections.abc import Iterable, Sequence

from tests.process import call

_EACH = """if True:
  import contextlib, importlib, io, json, sys
  from absl import flags
  from absl.testing import flagsaver

  program = importlib.import_module(sys.argv[1])
  program.define_flags()
  told = []
  for arguments in json.loads(sys.argv[2]):
    printed, end = io.StringIO(), ""
    with flagsaver.flagsaver(), contextlib.redirect_stdout(printed):
      sys.argv = [program.__name__, *arguments]
      flags.FLAGS(sys.argv)
      try:
        program.main(sys.argv[:1])
      except SystemExit as ended:
        end = str(ended.code)
    told.append([printed.getvalue(), end])
  print(json.dumps(told))
"""


def call_each(
  module: str, lists: Iterable[Sequence[object]], **variables: str
) -> list[tuple[str, str]]:
  """[(what a program of absl printed, what it ended with or '')].

  Args:
    module: of the program.
    lists: arguments, a list for each call.
    **variables: more environment variables.
  """
  texts = [[str(argument) for argument in arguments] for arguments in lists]
  done = call("-c", _EACH, module, json.dumps(texts), **variables)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])

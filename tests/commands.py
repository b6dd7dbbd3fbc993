"""Commands that messages and pages show, read as their programs read them."""

import json
import re
import shlex
from collections.abc import Sequence

from tests.process import call

# Each program checks its flags and its config; none of them begins its work.
_READ = """if True:
  import contextlib, importlib, io, json, sys
  from absl import flags
  from drift_jax import config as config_lib
  from drift_jax.system import devices, programs, storage

  programs.run = lambda *arguments, **settings: None
  storage.check = lambda *arguments, **settings: None
  config_lib.is_run = lambda source: True  # there is none yet
  devices.installed = lambda *names: "1"  # compilers
  before = set(flags.FLAGS)
  said = []
  for module, *arguments in json.loads(sys.argv[1]):
    sys.argv = [module, *arguments]
    told = io.StringIO()
    try:
      program = importlib.import_module(module)
      if hasattr(program, "__path__"):  # the page's server
        program = importlib.import_module(f"{module}.__main__")
        program.bind = lambda *arguments: contextlib.nullcontext()
        program.serve = lambda *arguments: None
      with contextlib.redirect_stderr(told):
        if hasattr(program, "define_flags"):
          for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
          flags.FLAGS.unparse_flags()
          program.define_flags()
          program.main(config_lib.parse_flags(sys.argv))
        else:
          program.main(arguments)
      said.append("")
    except (Exception, SystemExit) as error:
      said.append(f"{told.getvalue()} {error}")
  print(json.dumps(said))
"""


def mistakes(commands: Sequence[str]) -> dict[str, str]:
  """{command: what is wrong with it} of `python -m drift_jax.X ...`."""
  words = [shlex.split(command) for command in commands]
  for command in words:
    assert command[:2] == ["python", "-m"], command
  done = call("-c", _READ, json.dumps([command[2:] for command in words]))
  assert done.returncode == 0, done.stderr[-3000:]
  told = json.loads(done.stdout.splitlines()[-1])
  return {c: text for c, text in zip(commands, told, strict=True) if text}


def of_page(text: str) -> list[str]:
  """The commands of a page's bash blocks, one a line, loops unrolled."""
  commands = []
  for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
    for loop, name, values, body in re.findall(
      r"(for (\w+) in ([^;]*); do\n(.*?)done\n)", block, re.DOTALL
    ):
      unrolled = [body.replace(f"${name}", value) for value in values.split()]
      block = block.replace(loop, "".join(unrolled))
    for line in re.sub(r"\\\n *", "", block).splitlines():
      words = shlex.split(line, comments=True)
      if words:
        commands.append(shlex.join(words))
  return commands

"""Programs ask for large pages of memory, once, and are the same else."""

import os
import pathlib

import pytest

from drift_jax.system import programs
from tests.process import call

ON_REQUEST, GLIBC = "always [madvise] never\n", "glibc 2.36"
ASKED = "glibc.malloc.hugetlb=1"
# Each start of Python writes a line: large pages or not, and the arguments.
STARTED = """if True:
  import os, sys
  with open(os.environ["STARTS"], "a") as file:
    print(os.environ.get("GLIBC_TUNABLES"), sys.orig_argv[1:], file=file)
"""


@pytest.mark.parametrize(
  ("given", "mode", "libc", "wanted"),
  [
    ("", ON_REQUEST, GLIBC, ASKED),
    ("", ON_REQUEST, "glibc 2.35", ASKED),
    ("", ON_REQUEST, "glibc 3.0", ASKED),
    ("glibc.cpu.x=1", ON_REQUEST, GLIBC, f"glibc.cpu.x=1:{ASKED}"),
    (ASKED, ON_REQUEST, GLIBC, ""),
    ("glibc.malloc.hugetlb=0", ON_REQUEST, GLIBC, ""),
    ("", "[always] madvise never\n", GLIBC, ""),
    ("", "always madvise [never]\n", GLIBC, ""),
    ("", ON_REQUEST, "glibc 2.31", ""),
    ("", ON_REQUEST, "", ""),
  ],
)
def test_large_pages_are_asked_for_where_they_can_be(given, mode, libc, wanted):
  variables = {"GLIBC_TUNABLES": given} if given else {}
  assert programs.tunables(variables, mode, libc) == wanted


def is_given_on_request():
  """Whether this machine is one of those that programs start anew on."""
  try:
    libc = os.confstr("CS_GNU_LIBC_VERSION")
    mode = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return "[madvise]" in mode.read_text() and libc >= "glibc 2.35"
  except (AttributeError, OSError, ValueError):
    return False


@pytest.mark.parametrize("given", ["", "glibc.malloc.hugetlb=0"])
def test_a_program_starts_anew_with_its_arguments(tmp_path, given):
  (tmp_path / "sitecustomize.py").write_text(STARTED)
  starts = tmp_path / "starts"
  arguments = ["-W", "ignore", "-m", "drift_jax.tools.export"]
  arguments += [f"--from={tmp_path}/none", f"--out={tmp_path}/out"]
  done = call(
    *arguments,
    PYTHONPATH=f"{tmp_path}{os.pathsep}{os.getcwd()}",
    STARTS=str(starts),
    GLIBC_TUNABLES=given,
  )
  assert done.returncode == 1
  assert done.stderr.count("Error") == 1
  expected = [f"{given} {arguments}"]
  if not given and is_given_on_request():
    expected.append(f"{ASKED} {arguments}")
  assert starts.read_text().splitlines() == expected

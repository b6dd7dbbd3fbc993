"""requirements*.txt and launch/locks agree, for every Python that is tested."""

import importlib.metadata
import pathlib
import re
import sys

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
LOCKS = {
  path.stem.removeprefix("python"): path
  for path in (ROOT / "launch" / "locks").iterdir()
}
REMEDY = "run bash launch/lock.sh"


def lines(path):
  """Its lines without comments."""
  stripped = (
    line.split("#")[0].strip() for line in path.read_text().splitlines()
  )
  return [line for line in stripped if line]


def requirements():
  paths = sorted(ROOT.glob("requirements*.txt"))
  assert len(paths) == 3
  return [Requirement(line) for path in paths for line in lines(path)]


def locked(python):
  """{package: version}"""
  pairs = [line.split("==") for line in lines(LOCKS[python])]
  versions = {canonicalize_name(name): version for name, version in pairs}
  assert len(versions) == len(pairs)
  return versions


def test_pythons():
  project = (ROOT / "pyproject.toml").read_text()
  oldest = re.findall(r'requires-python = ">=(.*)"', project)
  workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
  (matrix,) = (
    job["strategy"]["matrix"]["python"] for job in workflow["jobs"].values()
  )
  assert matrix == sorted(LOCKS) and oldest == matrix[:1]
  # Those that scripts choose.
  for script in ("Dockerfile", "install.sh"):
    text = (ROOT / "launch" / script).read_text()
    chosen = re.findall(r"(?:ARG PYTHON=|--python )(\S+)", text)
    assert len(chosen) == 1 and set(chosen) <= set(LOCKS), script


@pytest.mark.parametrize("python", LOCKS)
def test_every_requirement_is_locked(python):
  versions = locked(python)
  machine = {
    "python_version": python,
    "python_full_version": f"{python}.0",
    "sys_platform": "linux",
    "platform_system": "Linux",
  }
  for requirement in requirements():
    marker = requirement.marker
    if marker is None or marker.evaluate(machine):
      version = versions.get(canonicalize_name(requirement.name))
      assert version is not None and requirement.specifier.contains(
        version, prereleases=True
      ), f"{requirement} is {version} in {LOCKS[python]}: {REMEDY}"


def test_what_packages_need_is_locked():
  """Those of this environment at these versions, and what they need."""
  python = "{}.{}".format(*sys.version_info)
  if python not in LOCKS:
    pytest.skip(f"there is no lock for Python {python}")
  versions = locked(python)
  left = [(r.name, frozenset(r.extras)) for r in requirements()]
  seen = set()
  while left:
    name, extras = left.pop()
    if (name, extras) in seen:
      continue
    seen.add((name, extras))
    try:
      needs = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
      continue  # for another system
    assert canonicalize_name(name) in versions, f"{name}: {REMEDY}"
    if importlib.metadata.version(name) != versions[canonicalize_name(name)]:
      continue  # a newer one, which may need others
    for need in map(Requirement, needs):
      if need.marker is None or any(
        need.marker.evaluate(default_environment() | {"extra": extra})
        for extra in extras | {""}
      ):
        left.append((need.name, frozenset(need.extras)))

"""What pyproject.toml can't say of the package: configs, extras and README."""

import pathlib
import re
import tomllib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
# Lines of requirements.txt that not every user needs.
EXTRAS = {
  "hub": ("pyarrow",),
  "serve": ("starlette", "uvicorn"),
  "tfds": ("tensorflow-datasets",),
}
FILES = {
  "robots": "requirements-robots.txt",
  "dev": "requirements-dev.txt",
}


def requirements(file: str) -> dict[str, str]:
  """{package: its line} of a file of requirements."""
  lines = (ROOT / file).read_text().splitlines()
  lines = [line.split("#")[0].strip() for line in lines]
  return {re.split(r"[^\w.-]", line)[0]: line for line in lines if line}


def readme() -> str:
  """README.md for where its neighbours are not.

  Relative links become links into the repository of pyproject.toml's urls.
  Unless it names one, their text stays alone, and pictures are left out.
  """
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  repository = project["urls"].get("Repository")

  def link(match: re.Match[str]) -> str:
    picture, text, target = match.groups()
    if not repository:
      return "" if picture else text
    kind = "raw" if picture else "blob"
    return f"{picture}[{text}]({repository}/{kind}/main/{target})"

  relative = r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)"
  return re.sub(relative, link, (ROOT / "README.md").read_text())


base = requirements("requirements.txt")
extras = {
  extra: [base.pop(package) for package in packages]
  for extra, packages in EXTRAS.items()
}
extras |= {k: [*requirements(file).values()] for k, file in FILES.items()}
extras["all"] = [f"drift_jax[{','.join(k for k in extras if k != 'dev')}]"]
setup(
  packages=[*find_packages(include=["drift_jax*"]), "drift_jax.configs"],
  package_dir={"drift_jax.configs": "configs"},
  long_description=readme(),
  long_description_content_type="text/markdown",
  install_requires=[*base.values()],
  extras_require=extras,
)

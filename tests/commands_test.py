"""Commands that pages show: programs, flags and configs that exist."""

import re
import shlex
import subprocess

import pytest

from tests import commands
from tests.conftest import ROOT
from tests.training import remedies_test

PAGES = ("imagenet", "data", "evaluation", "encoders", "scaling", "one_gpu")
# Of other programs; the rest must be ours.
OTHERS = {"pip", "mkdir", "mv", "gcloud", "source", "tensorboard"}
LAUNCHERS = {"tpu_pod.sh", "gke.sh", "slurm.sbatch", "docker.sh"}


def program(command):
  """`python -m drift_jax.X ...` of a command; '' if it is none of ours."""
  words = shlex.split(command)
  while "python" not in words[0].rpartition("/")[2].split(".")[:1]:
    if len(words) == 1:
      return ""
    words = words[1:]
  return shlex.join(["python", *words[1:]]) if words[1] == "-m" else ""


def shown():
  """{command: page} of all pages; not those with an ellipsis for flags."""
  return {
    command: page
    for page in PAGES
    for command in commands.of_page((ROOT / f"docs/{page}.md").read_text())
    if not re.search(r"\.\.\.|COMMAND|=N\b", command)
  }


def test_every_program_takes_its_flags_and_config():
  ours = {program(command): page for command, page in shown().items()}
  ours.pop("")
  # Launchers give the same flags to training.
  for command in launched():
    given = [w for w in shlex.split(command) if w.startswith("--config")]
    training = ["python", "-m", "drift_jax.main", "--workdir=x", *given]
    if given:
      ours[shlex.join(training)] = "a launcher"
  assert list(ours.values()).count("imagenet") > 20
  ours = [c for c in ours if c.startswith("python -m drift_jax.")]
  assert commands.mistakes(ours) == {}


def launched():
  return [
    command
    for command in shown()
    if command.startswith("bash launch/")
    and command.split("/")[1].split()[0] in LAUNCHERS
  ]


@pytest.mark.system
@pytest.mark.parametrize("command", launched())
def test_every_launcher_takes_its_flags(command):
  words = shlex.split(command)
  words.insert(3, "--dry-run")  # before what may follow --
  if "setup" in words:
    words.append("--repository=https://example.org/drift_jax")
  done = subprocess.run(
    words, cwd=ROOT, capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout


def test_all_other_commands_are_known():
  """Snippets of Python compile, scripts exist."""
  for command, page in shown().items():
    words = shlex.split(re.sub(r"^PYTHON=\S+ ", "", command))
    if program(command):
      continue
    if words[0] == "bash":
      assert (ROOT / words[1]).is_file(), (page, command)
    elif words[:2] == ["python", "-c"]:
      compile(words[2], page, "exec")
    elif words[0] == "python":
      assert (ROOT / words[1]).is_file(), (page, command)
    else:
      assert words[0] in OTHERS, (page, command)


@pytest.mark.parametrize(
  "name",
  ["imagenet_pixel:l16", "imagenet_latent:ablation", "imagenet_latent:l2"],
)
def test_what_a_run_lists_is_on_the_page(name, tmp_path, monkeypatch):
  """Each command, and each size."""
  monkeypatch.chdir(tmp_path)
  page = (ROOT / "docs/imagenet.md").read_text()
  there = set(commands.of_page(page))
  listed = remedies_test.lines(remedies_test.get(name))
  assert len(listed) == 5
  for line in listed:
    *_, command = remedies_test.commands_of(line)
    assert shlex.join(shlex.split(command)) in there
    (size,) = re.findall(r"[\d.]+ [GM]B", line)[:1]
    assert size in page

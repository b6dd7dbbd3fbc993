"""The docs: links, names of files and functions, the site, what pages claim."""

import importlib
import json
import pathlib
import re
import symtable

import pytest
import yaml

import drift_jax
from benchmarks import method_pictures
from tests.process import call

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
PACKAGES = ("data", "drift", "metrics", "models")


def defined(path):
  """Names that a module defines itself."""
  table = symtable.symtable(path.read_text(), str(path), "exec")
  names = table.get_symbols()
  return {
    name.get_name()
    for name in names
    if name.is_assigned() and not name.is_imported()
  }


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_a_page_names_is_there(page):
  text = page.read_text()
  for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
    assert "://" in link or (page.parent / link).exists(), link
  for file, name in re.findall(r"`([\w/]+/\w+\.py):([a-zA-Z_]\w*)`", text):
    # After other configs there is a variant.
    if not file.startswith("configs/") or file == "configs/common.py":
      assert name in defined(ROOT / file), f"{file}:{name}"
  for file in re.findall(r"`((?:benchmarks|drift_jax|tests)/[\w/]+\.py)", text):
    assert (ROOT / file).exists(), file


def test_one_version_everywhere():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  newest = re.search(
    r"^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
  )
  assert newest is not None
  assert newest[1] == citation["version"] == drift_jax.__version__
  assert newest[2] == citation["date-released"]
  assert f"{{{newest[1]}}}" in (ROOT / "docs" / "index.md").read_text()


def test_issue_forms_have_what_github_wants():
  for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
    form = yaml.safe_load(path.read_text())
    if path.stem != "config":
      assert form["name"] and form["description"], path
      assert all(item["attributes"] for item in form["body"]), path


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
  done = call(
    *("-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}"),
    NO_MKDOCS_2_WARNING="1",
  )
  assert done.returncode == 0, done.stderr
  reference = (tmp_path / "reference" / "index.html").read_text()
  for package in PACKAGES:
    module = importlib.import_module(f"drift_jax.{package}")
    for names in module._NAMES.values():
      for name in names:
        assert f"drift_jax.{package}.{name}" in reference, name
  # A reader loads nothing from another host.
  elsewhere = re.compile(r'<(script|img|link)[^>]+(src|href)="(https?:)?//')
  for page in tmp_path.rglob("*.html"):
    assert not elsewhere.search(page.read_text()), page
  index = json.loads((tmp_path / "search" / "search_index.json").read_text())
  titles = {entry["title"] for entry in index["docs"]}
  assert "drift_jax.drift.drift_loss" in titles


@pytest.mark.slow
def test_the_loss_and_the_drift_do_not_rank_samples(tmp_path):
  """docs/troubleshooting.md's table, with one batch for each row."""
  levels = method_pictures.digits_levels(affinity_floor=0.0, draws=1)
  reals, mean, grey = levels.values()
  assert grey["loss"] < mean["loss"] < reals["loss"] < 9
  for tau in (0.02, 0.05, 0.2):
    assert mean[f"drift_rms/{tau}"] < reals[f"drift_rms/{tau}"]
    assert reals[f"neighbours/{tau}"] < grey[f"neighbours/{tau}"]
  assert grey["drift_rms/0.02"] < 1e-8 < 0.05 < reals["drift_rms/0.02"]
  floored = method_pictures.digits_levels(affinity_floor=1e-6, draws=1)
  assert floored["grey"]["loss"] > 8.9 > floored["held-out reals"]["loss"]
  # The pictures, of a run that had reals in its samples' place.
  (tmp_path / "metrics.jsonl").write_text(
    "\n".join(json.dumps({"step": step, **reals}) for step in (1, 2))
  )
  method_pictures.main([str(tmp_path / "pictures"), str(tmp_path)])
  assert len([*(tmp_path / "pictures").glob("*.png")]) == 3

import json
import math

import numpy as np
import pytest

from drift_jax.metrics import files
from drift_jax.system.errors import EvaluationError


def test_appears_only_when_complete(tmp_path):
  path = tmp_path / "new" / "file.txt"
  for text in ("old", "new"):
    before = path.exists() and path.read_text()
    with files.replacing(path) as temporary:
      temporary.write_text(text)
      assert temporary.parent == path.parent
      assert (path.exists() and path.read_text()) == before
    assert path.read_text() == text
  with pytest.raises(RuntimeError), files.replacing(path) as temporary:
    temporary.write_text("half")
    raise RuntimeError
  assert path.read_text() == "new"
  assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_report_holds_finite_numbers_only(tmp_path, number):
  path = tmp_path / "report.json"
  report = {"step": 3, "results": {1.5: {"fid": 2.25, "kid": [0.0, 1e-30]}}}
  files.write_report(path, report)
  written = path.read_text()
  assert json.loads(written)["results"] == {"1.5": report["results"][1.5]}
  report["results"][1.5]["kid"][1] = number
  with pytest.raises(
    EvaluationError, match=f"report.json .*results/1.5/kid/1 is {number}:"
  ):
    files.write_report(path, report)
  assert path.read_text() == written and list(tmp_path.iterdir()) == [path]


def test_what_is_no_npz_is_named(tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, np.arange(1000))
  whole = path.read_bytes()
  for data, message in (
    (whole, "whatever reading it raises"),
    (b"text", "this is no .npz file"),
    (whole[: len(whole) // 2], "or is cut short"),
    (2 * whole, "several files in one"),
  ):
    path.write_bytes(data)
    with (
      pytest.raises(ValueError, match=f"a.npz: .*{message}"),
      files.reading_npz(path),
    ):
      raise ValueError("whatever reading it raises")

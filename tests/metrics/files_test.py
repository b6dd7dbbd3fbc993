import pytest

from drift_jax.metrics import files


def test_appears_only_when_complete(tmp_path):
  path = tmp_path / "new" / "file.txt"
  with files.replacing(path) as temporary:
    temporary.write_text("old")
    assert temporary.parent == path.parent
    assert not path.exists()
  assert path.read_text() == "old"
  with files.replacing(path) as temporary:
    temporary.write_text("new")
    assert path.read_text() == "old"
  assert path.read_text() == "new"
  assert list(path.parent.iterdir()) == [path]


def test_failure_leaves_the_old_file_and_no_other(tmp_path):
  path = tmp_path / "file.txt"
  path.write_text("old")
  with pytest.raises(RuntimeError), files.replacing(path) as temporary:
    temporary.write_text("half")
    raise RuntimeError
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]

"""launch/colab.ipynb runs from top to bottom, on CPU with its small setting."""

import base64
import pathlib

import nbclient
import nbformat
import pytest

from tests.autoencoders import save_vae
from tests.conftest import GOLDEN
from tests.process import process_environment

PATH = pathlib.Path(__file__).parent.parent / "launch" / "colab.ipynb"
# The smoke variant with the model of tests.tasks.generator.train_test.
CONFIG = """
from configs import digits


def get_config():
  config = digits.get_config("smoke")
  config.model.update(depth=1, hidden_size=16, cond_dim=16, num_heads=2)
  config.batch.update(generated=4, positives=8)
  config.optim.schedule = "constant"
  return config
"""


def outputs(notebook, cell_id):
  """(all text, the bytes of all PNGs) that a cell printed and showed."""
  (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
  text = "".join(o.text for o in cell.outputs if o.output_type == "stream")
  images = [
    base64.b64decode(o.data["image/png"])
    for o in cell.outputs
    if o.output_type == "display_data" and "image/png" in o.data
  ]
  return text, images


@pytest.mark.system
def test_runs(tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  (tmp_path / "tiny.py").write_text(CONFIG)
  variables = process_environment() | {
    "DRIFT_JAX_CONFIG": str(tmp_path / "tiny.py"),
    "DRIFT_JAX_WORKDIR": str(workdir),
    "DRIFT_JAX_WEIGHTS": str(GOLDEN / "artifact_gen"),
    "DRIFT_JAX_VAE": str(save_vae(tmp_path / "vae", latent_channels=4)),
    "IPYTHONDIR": str(tmp_path / "ipython"),
  }
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  monkeypatch.delenv("DRIFT_JAX_REPOSITORY", raising=False)
  notebook = nbformat.read(PATH, as_version=4)
  nbclient.NotebookClient(
    notebook,
    timeout=300,
    kernel_name="python3",
    resources={"metadata": {"path": str(PATH.parent)}},
  ).execute()

  text, _ = outputs(notebook, "install")
  assert text == f"In {PATH.parent.parent}\n"  # nothing was installed
  assert "eval step 20, alpha 1:" in outputs(notebook, "train")[0]
  assert len(outputs(notebook, "curves")[1]) == 2
  _, images = outputs(notebook, "samples")
  assert images == [(workdir / "samples" / "step_0000020.png").read_bytes()]
  text, images = outputs(notebook, "alphas")
  assert "alpha 1:" in text and "alpha 3:" in text
  assert images == [
    (workdir / f"alpha_{alpha}.png").read_bytes() for alpha in (1, 3)
  ]
  text, images = outputs(notebook, "load")
  assert "10 classes" in text and len(images) == 1
  text, images = outputs(notebook, "sweep")
  assert text.split() == "alpha 1: alpha 2: alpha 3: alpha 4:".split()
  assert len(images) == len(set(images)) == 4
  assert len(outputs(notebook, "walk")[1]) == 6

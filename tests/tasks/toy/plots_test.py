"""The pictures of toys: what is in the files, not what it looks like."""

import numpy as np
from PIL import Image

from drift_jax.tasks.toy.plots import plot_field, save_evolution

RNG = np.random.default_rng(0)
DATA = RNG.normal(0.0, 0.3, size=(200, 2))
FRAMES = [(10 * i, DATA + 0.3 * (3 - i)) for i in range(4)]


def test_evolution_moves(tmp_path):
  path = tmp_path / "plots" / "evolution.gif"
  save_evolution(FRAMES, DATA, path, title="moons")
  pictures = []
  with Image.open(path) as animation:
    assert animation.n_frames == len(FRAMES)
    for number in range(animation.n_frames):
      animation.seek(number)
      pictures.append(np.asarray(animation.convert("RGB")).astype(int))
  for before, after in zip(pictures[:-1], pictures[1:], strict=True):
    assert np.abs(before - after).max() > 50
  # Frame and ticks stand still: the left margin has nothing else.
  margin = [picture[60:, :55] for picture in pictures]
  assert all((picture == margin[0]).all() for picture in margin)


def test_field_is_drawn(tmp_path):
  side = np.linspace(-1, 1, 5)
  grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
  path = tmp_path / "field.png"
  panels = [(0, DATA, -grid), (5, DATA, 0 * grid)]
  plot_field(panels, grid, DATA, path, limit=1.2)
  with Image.open(path) as picture:
    pixels = np.asarray(picture.convert("RGB")).astype(int)
  assert pixels.shape[1] > 1.5 * pixels.shape[0]  # two panels side by side

  def dark(part):
    """Pixels of the strongest arrows' colours."""
    red, _, blue = np.moveaxis(part, -1, 0)
    return ((red < 90) & (blue > 95)).sum()

  half = int(pixels.shape[1] * 0.45)
  inner = pixels[100:-100]
  assert dark(inner[:, 60 : half - 40]) > 100
  assert dark(inner[:, half + 60 : int(1.85 * half)]) == 0  # V = 0: no arrow

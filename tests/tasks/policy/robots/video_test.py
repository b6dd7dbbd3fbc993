"""Videos of episodes."""

import sys

import numpy as np
import pytest
from PIL import Image

from drift_jax.tasks.policy import robots
from drift_jax.tasks.policy.robots import video


def episode(success, shades, size=(16, 24)):
  frames = [np.full((*size, 3), shade, np.uint8) for shade in shades]
  return robots.Episode(0, success, frames=frames)


def read(path):
  """(frames [N, H, W, 3], milliseconds [N])."""
  with Image.open(path) as image:
    frames, times = [], []
    for number in range(image.n_frames):
      image.seek(number)
      times.append(image.info["duration"])
      frames.append(np.asarray(image.convert("RGB")).astype(int))
  return np.stack(frames), times


def is_green(pixel):
  return pixel[1] > pixel[0] + 50


def is_red(pixel):
  return pixel[0] > pixel[1] + 50


def test_a_grid(tmp_path, monkeypatch):
  path = tmp_path / "video.gif"
  episodes = [
    episode(True, [0, 80, 160]),
    episode(False, [0, 80, 160, 200, 240]),
    episode(True, [60, 100]),
  ]
  monkeypatch.setattr(video, "_COLUMNS", 2)
  robots.save_video(path, episodes)
  frames, times = read(path)
  # Two rows of two, the last place is empty.
  assert frames.shape == (5, 32, 48, 3)
  # The last frame stays for a second.
  assert times == [100, 100, 100, 100, 1100]
  top_left, top_right = frames[:, 8, 12], frames[:, 8, 36]
  bottom, empty = frames[:, 24, 12], frames[:, 24, 36]
  np.testing.assert_allclose(top_left[:, 0], [0, 80, 160, 160, 160], atol=8)
  np.testing.assert_allclose(top_right[:, 0], [0, 80, 160, 200, 240], atol=8)
  np.testing.assert_allclose(bottom[:, 0], [60, 100, 100, 100, 100], atol=8)
  assert (empty > 247).all()
  # The borders are there once an episode is over.
  assert [is_green(frame[0, 0]) for frame in frames] == [False] * 2 + [True] * 3
  assert [is_red(frame[0, 24]) for frame in frames] == [False] * 4 + [True]
  assert [is_green(frame[16, 0]) for frame in frames] == [False] + [True] * 4
  assert list(tmp_path.iterdir()) == [path]


def test_what_is_refused(tmp_path, monkeypatch):
  good = [episode(True, [0])]
  monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
  for name, episodes, message in (
    ("video.avi", good, r"'.gif', '.mp4'.*not '.avi'"),
    ("video.mp4", good, r"imageio-ffmpeg.*\.gif needs"),
    ("VIDEO.GIF", [], "needs recorded episodes"),
    ("video.gif", [*good, robots.Episode(1)], "needs recorded episodes"),
  ):
    with pytest.raises(robots.RobotError, match=message):
      robots.save_video(tmp_path / name, episodes)
  assert list(tmp_path.iterdir()) == []

"""Videos of episodes."""

import sys
import types

import numpy as np
import pytest
from PIL import Image

from drift_jax.tasks.policy import robots


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


def test_a_grid(tmp_path):
  path = tmp_path / "video.gif"
  episodes = [
    episode(True, [0, 80, 160]),
    episode(False, [0, 80, 160, 200, 240]),
    episode(True, [60, 100]),
  ]
  robots.save_video(path, episodes, fps=20, columns=2)
  frames, times = read(path)
  # Two rows of two, the last place is empty.
  assert frames.shape == (5, 32, 48, 3)
  # The last frame stays for a second.
  assert times == [50, 50, 50, 50, 1050]
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


def test_recorded_episodes(tmp_path):
  path = tmp_path / "video.gif"
  episodes = robots.rollouts(
    [robots.make("obstacle"), robots.make("obstacle")],
    lambda observations, *_: np.full((2, 4, 2), 0.1),
    seeds=[0, 1],
    observation_horizon=1,
    executed=4,
    threads=1,
    record=2,
  )
  robots.save_video(path, episodes, columns=4)
  frames, _ = read(path)
  # No more columns than episodes.
  assert frames.shape[1:] == (128, 256, 3)
  drawn = episodes[0].frames[0].astype(int)
  assert np.abs(frames[0, :, :128] - drawn).mean() < 4


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
  path = tmp_path / "video.gif"
  path.write_bytes(b"before")

  def save(image, target, **_):
    target.write_bytes(b"half")
    raise OSError("disk full")

  monkeypatch.setattr(Image.Image, "save", save)
  with pytest.raises(OSError, match="disk full"):
    robots.save_video(path, [episode(True, [0, 1])])
  assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"before"


def test_mp4(tmp_path, monkeypatch):
  path = tmp_path / "video.mp4"
  sent = []

  def write_frames(target, size, *, fps):
    assert target.endswith(".mp4") and fps == 4
    try:
      while True:
        frame = yield
        sent.append(frame.shape[1::-1] == size)
    finally:
      with open(target, "wb") as file:
        file.write(b"video")

  ffmpeg = types.ModuleType("imageio_ffmpeg")
  monkeypatch.setattr(ffmpeg, "write_frames", write_frames, raising=False)
  monkeypatch.setitem(sys.modules, "imageio_ffmpeg", ffmpeg)
  robots.save_video(path, [episode(True, [0, 1, 2])], fps=4)
  # A second at the end.
  assert sent == [True] * 7
  assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"video"


def test_what_is_refused(tmp_path, monkeypatch):
  good = [episode(True, [0])]
  with pytest.raises(robots.RobotError, match=r"'.gif', '.mp4'.*not '.avi'"):
    robots.save_video(tmp_path / "video.avi", good)
  monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
  with pytest.raises(robots.RobotError, match=r"imageio-ffmpeg.*\.gif needs"):
    robots.save_video(tmp_path / "video.mp4", good)
  assert robots.video_ending("runs/VIDEO.GIF") == ".gif"
  path = tmp_path / "video.gif"
  for episodes in ([], [*good, robots.Episode(1)]):
    with pytest.raises(robots.RobotError, match="needs recorded episodes"):
      robots.save_video(path, episodes)
  with pytest.raises(robots.RobotError, match="different sizes"):
    robots.save_video(path, [*good, episode(True, [0], (8, 8))])
  with pytest.raises(robots.RobotError, match="0 columns"):
    robots.save_video(path, good, columns=0)
  with pytest.raises(robots.RobotError, match="at 0 frames"):
    robots.save_video(path, good, fps=0)
  assert list(tmp_path.iterdir()) == []

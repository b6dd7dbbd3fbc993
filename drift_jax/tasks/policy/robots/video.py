"""Videos of recorded episodes."""

import importlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from drift_jax.metrics.files import replacing
from drift_jax.tasks.policy.robots.interface import RobotError
from drift_jax.tasks.policy.robots.rollouts import Episode

_STEPS_A_SECOND = 10
_COLUMNS = 4
_BORDER = 3
_SUCCESS = (46, 160, 67)
_FAILURE = (207, 34, 46)
# For how long the last picture, with all the borders, is shown.
_HOLD_SECONDS = 1.0
# Pictures from which a GIF's colours are chosen, besides the last one.
_PALETTE_FRAMES = 8


def video_ending(path: str | os.PathLike[str]) -> str:
  """The ending of a video's path, in small letters, which says its format.

  Raises:
    RobotError: one that nothing here writes.
  """
  ending = pathlib.PurePath(path).suffix.lower()
  if ending not in _WRITERS:
    raise RobotError(
      f"{path}: a video ends in one of {list(_WRITERS)}, not {ending!r}"
    )
  return ending


def save_video(
  path: str | os.PathLike[str], episodes: Sequence[Episode]
) -> None:
  """Writes episodes side by side, as GIF or MP4; whole or not at all.

  An episode that is over shows its last frame: with a green border if it
  succeeded, with a red one if it failed.

  Args:
    path: .gif, or .mp4 if imageio-ffmpeg is installed.
    episodes: with frames, all of the same size.

  Raises:
    RobotError: another ending, a missing package, no frames.
  """
  write = _WRITERS[video_ending(path)]
  if not episodes or not all(each.frames for each in episodes):
    raise RobotError(
      "a video needs recorded episodes: rollouts(record=N) records the first N"
    )
  with replacing(path) as partial:
    write(partial, _grid(episodes))


def _grid(episodes: Sequence[Episode]) -> np.ndarray:
  """Pictures [N, rows H, columns W, 3], one for each step of the longest."""
  length = max(len(each.frames) for each in episodes)
  columns = min(_COLUMNS, len(episodes))
  rows = -(-len(episodes) // columns)
  size = episodes[0].frames[0].shape
  grid = np.full((rows * columns, length, *size), 255, np.uint8)
  for place, episode in enumerate(episodes):
    *frames, last = episode.frames
    framed = np.empty_like(last)
    framed[:] = _SUCCESS if episode.success else _FAILURE
    inner = slice(_BORDER, -_BORDER)
    framed[inner, inner] = last[inner, inner]
    grid[place] = frames + [framed] * (length - len(frames))
  height, width, _ = size
  grid = grid.reshape(rows, columns, length, *size).transpose(2, 0, 3, 1, 4, 5)
  return grid.reshape(length, rows * height, columns * width, 3)


def _write_gif(path: pathlib.Path, frames: np.ndarray) -> None:
  # One palette for all, or colours would flicker.
  every = -(-len(frames) // _PALETTE_FRAMES)
  tall = np.concatenate([*frames[::every], frames[-1]])
  palette = Image.fromarray(tall).quantize(256)
  step = 1000 / _STEPS_A_SECOND
  images = [
    Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
    for frame in frames
  ]
  images[0].save(
    path,
    "GIF",
    save_all=True,
    append_images=images[1:],
    duration=[*[step] * (len(frames) - 1), step + 1000 * _HOLD_SECONDS],
    loop=0,
  )


def _write_mp4(path: pathlib.Path, frames: np.ndarray) -> None:
  try:
    ffmpeg = importlib.import_module("imageio_ffmpeg")
  except ImportError as error:
    raise RobotError(
      ".mp4 needs the package imageio-ffmpeg (pip install imageio-ffmpeg); "
      ".gif needs nothing"
    ) from error
  writer = ffmpeg.write_frames(
    str(path),
    frames.shape[2:0:-1],
    fps=_STEPS_A_SECOND,
    output_params=["-f", "mp4"],
  )
  writer.send(None)
  try:
    held = [frames[-1]] * round(_STEPS_A_SECOND * _HOLD_SECONDS)
    for frame in [*frames, *held]:
      writer.send(frame)
  finally:
    writer.close()


_WRITERS = {".gif": _write_gif, ".mp4": _write_mp4}

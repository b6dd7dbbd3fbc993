"""Videos of recorded episodes."""

import importlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from drift_jax.system import paths
from drift_jax.tasks.policy.robots.errors import RobotError
from drift_jax.tasks.policy.robots.rollouts import Episode

_BORDER = 3
_SUCCESS = (46, 160, 67)
_FAILURE = (207, 34, 46)
# For how long the last picture, with all the borders, is shown.
_HOLD_SECONDS = 1.0
# From which a GIF's colours are chosen, and the last one.
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
  path: str | os.PathLike[str],
  episodes: Sequence[Episode],
  *,
  fps: float = 10.0,
  columns: int = 4,
  ending: str | None = None,
) -> None:
  """Writes episodes side by side, as GIF or MP4; whole or not at all.

  An episode that is over shows its last frame, in green where it succeeded, in
  red where it failed.

  Args:
    path: .gif, or .mp4 where imageio-ffmpeg is installed.
    episodes: with frames, all of the same size.
    fps: steps per second.
    columns: episodes in a row, at most.
    ending: '.gif' or '.mp4', in place of the path's own.

  Raises:
    RobotError: another ending, a missing package, no episodes, no frames,
      frames of different sizes, or sizes below 1.
  """
  path = pathlib.Path(paths.expand(path))
  ending = video_ending(path) if ending is None else ending
  if columns < 1 or not fps > 0:
    raise RobotError(
      f"{path}: {columns} columns at {fps:g} frames a second: want at least 1, "
      "and more than 0"
    )
  frames = _grid(episodes, columns)
  # Beside it, so that it can be moved there; hidden, with the ending that tells
  # the format.
  partial = path.with_name(f".{path.stem}.{os.getpid()}{ending}")
  try:
    _WRITERS[ending](partial, frames, fps)
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def _grid(episodes: Sequence[Episode], columns: int) -> list[np.ndarray]:
  """Pictures [rows H, columns W, 3], one for each step of the longest."""
  shapes = {frame.shape for each in episodes for frame in each.frames}
  if not episodes or not all(each.frames for each in episodes):
    raise RobotError(
      "a video needs recorded episodes: rollouts(record=N) records the first N"
    )
  if len(shapes) > 1:
    raise RobotError(f"frames of different sizes: {sorted(shapes)}")
  height, width, _ = shapes.pop()
  columns = min(columns, len(episodes))
  rows = -(-len(episodes) // columns)
  pictures = []
  for number in range(max(len(each.frames) for each in episodes)):
    picture = np.full((rows, height, columns, width, 3), 255, np.uint8)
    for place, episode in enumerate(episodes):
      frame = _frame(episode, number)
      picture[place // columns, :, place % columns] = frame
    pictures.append(picture.reshape(rows * height, columns * width, 3))
  return pictures


def _frame(episode: Episode, number: int) -> np.ndarray:
  """The frame of a step; the last one, and those behind it, have a border."""
  last = len(episode.frames) - 1
  if number < last:
    return episode.frames[number]
  inner = episode.frames[last][_BORDER:-_BORDER, _BORDER:-_BORDER]
  framed = np.empty_like(episode.frames[last])
  framed[:] = _SUCCESS if episode.success else _FAILURE
  framed[_BORDER:-_BORDER, _BORDER:-_BORDER] = inner
  return framed


def _write_gif(
  path: pathlib.Path, frames: list[np.ndarray], fps: float
) -> None:
  # One palette for all, or colours would flicker.
  every = -(-len(frames) // _PALETTE_FRAMES)
  tall = np.concatenate([*frames[::every], frames[-1]])
  palette = Image.fromarray(tall).quantize(256)
  step = 1000 / fps
  images = [
    Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
    for frame in frames
  ]
  images[0].save(
    path,
    save_all=True,
    append_images=images[1:],
    duration=[*[step] * (len(frames) - 1), step + 1000 * _HOLD_SECONDS],
    loop=0,
  )


def _write_mp4(
  path: pathlib.Path, frames: list[np.ndarray], fps: float
) -> None:
  try:
    ffmpeg = importlib.import_module("imageio_ffmpeg")
  except ImportError as error:
    raise RobotError(
      f"{path.suffix} needs the package imageio-ffmpeg (pip install "
      "imageio-ffmpeg); .gif needs nothing"
    ) from error
  height, width, _ = frames[0].shape
  writer = ffmpeg.write_frames(str(path), (width, height), fps=fps)
  writer.send(None)
  try:
    for frame in frames + frames[-1:] * round(fps * _HOLD_SECONDS):
      writer.send(np.ascontiguousarray(frame))
  finally:
    writer.close()


_WRITERS = {".gif": _write_gif, ".mp4": _write_mp4}

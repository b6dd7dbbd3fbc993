"""Writers to Weights & Biases and trackio: `pip install wandb`, or trackio."""

import contextlib
import contextvars
import importlib.util
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from drift_jax.metrics import files
from drift_jax.metrics.writers import MultiWriter
from drift_jax.system import exits, storage
from drift_jax.system.console import logger
from drift_jax.system.errors import ConfigError, one_line

PROJECT = "drift_jax"
# What the services know a run by: a resumed run goes on under the same.
ID_FILE = "run_id.txt"
# W&B may take so long to upload at the end; `wandb sync` sends the rest.
_END_SECONDS = 300.0
# Each service at the end of a run that was told to stop: a machine that is
# taken away is there for half a minute.
_STOP_SECONDS = 10.0
_REMEDIES = {
  "wandb": "log in (wandb login), set WANDB_MODE=offline",
  "trackio": "look at TRACKIO_SPACE_ID, TRACKIO_SERVER_URL and TRACKIO_DIR",
}


class ServiceWriter(MultiWriter):
  """Scalars and images to a service, without which the run goes on.

  A failure is said once; nothing is sent after it.
  """

  def __init__(
    self,
    name: str,
    log: Callable[[int, dict[str, Any]], None],
    image: Callable[[np.ndarray], Any],
    finish: Callable[[bool], None],
  ):
    """Args:
    name: of the service.
    log: called with (step, {name: number, or what `image` returns}).
    image: called with uint8 [H, W, 3].
    finish: ends the service's run; called with whether it failed.
    """
    super().__init__([])  # ignores all but scalars and images
    self._name, self._log, self._image = name, log, image
    self._finish = finish
    self._ended = False

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    with self._surviving() as goes_on:
      if goes_on:
        values = jax.device_get(dict(scalars))
        self._log(step, {k: np.asarray(v).item() for k, v in values.items()})

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    with self._surviving() as goes_on:
      if goes_on:
        self._log(step, {k: self._image(v) for k, v in images.items()})

  def close(self) -> None:
    """Sends what is left; the exception that ends the run is the current one.

    After a request to stop it takes 10 s at most.
    """
    error = sys.exc_info()[1]
    if not isinstance(error, exits.Preempted):
      self._end(error is not None)
      return
    # trackio finds its run by the context.
    context = contextvars.copy_context()
    thread = threading.Thread(
      target=context.run, args=(self._end, True), daemon=True
    )
    thread.start()
    thread.join(_STOP_SECONDS)
    if thread.is_alive():
      exits.leave_behind()
      logger.warning(
        "%s did not take the rest of this run within %g s.",
        self._name,
        _STOP_SECONDS,
      )

  def _end(self, failed: bool) -> None:
    with self._surviving() as goes_on:
      if goes_on:
        self._finish(failed)
    self._ended = True

  @contextlib.contextmanager
  def _surviving(self) -> Iterator[bool]:
    """Yields whether the service is still there; its errors end in a line."""
    try:
      yield not self._ended
    except Exception as error:
      self._ended = True
      logger.warning(
        "%s gets no more of this run, which goes on: %s: %s",
        self._name,
        type(error).__name__,
        one_line(error),
      )


def check(names: Sequence[str]) -> None:
  """Finds out whether services can be used, before anything takes time.

  Args:
    names: of options.SERVICES.

  Raises:
    ConfigError: a missing package, no login, a server that can't be reached.
  """
  for name in names:
    if importlib.util.find_spec(name) is None:
      raise ConfigError(
        f"writers: {name!r} needs a package: pip install {name}"
      )
  if "wandb" in names:
    with _starting("wandb"):
      _check_login()


def _check_login() -> None:
  """Has W&B's server check the login, unless the run is to be offline."""
  import wandb

  if wandb.setup().settings.mode != "online":
    return
  # It would ask on a terminal, where nobody may be.
  if not wandb.login(verify=True, prompt=False):
    raise ValueError("nobody is logged in")


@contextlib.contextmanager
def _starting(name: str) -> Iterator[None]:
  """Makes a ConfigError of whatever a service raises."""
  try:
    yield
  except Exception as error:
    raise ConfigError(
      f"writers: {name!r} can't start: {one_line(error)}: {_REMEDIES[name]}, "
      "or leave it out of `writers`"
    ) from error


def start(
  names: Sequence[str], workdir: files.PathLike, config: Mapping[str, Any]
) -> list[ServiceWriter]:
  """Starts a run at each service, or goes on with the one of the workdir.

  Args:
    names: of options.SERVICES.
    workdir: gives the run its name; keeps what the services know it by.
    config: the resolved config.

  Raises:
    ConfigError: a service that can't start.
  """
  path = epath.Path(workdir)
  file = path / ID_FILE
  if not file.exists():
    with files.replacing(file) as temporary:
      temporary.write_text(uuid.uuid4().hex[:8])
  writers = []
  for name in names:
    with _starting(name):
      begin = {"wandb": _wandb, "trackio": _trackio}[name]
      writers.append(begin(path, file.read_text(), dict(config)))
  return writers


def _wandb(
  path: epath.Path, identity: str, config: dict[str, Any]
) -> ServiceWriter:
  import wandb

  folder = os.fspath(path)
  run = wandb.init(
    project=os.environ.get("WANDB_PROJECT", PROJECT),
    name=os.environ.get("WANDB_NAME", path.name),
    id=identity,
    resume="allow",
    config=config,
    allow_val_change=True,  # a resumed run may be longer
    # A bucket can't hold it: W&B then takes the working directory.
    dir=os.environ.get(
      "WANDB_DIR", None if storage.is_remote(path) else folder
    ),
    settings=wandb.Settings(finish_timeout=_END_SECONDS),
  )
  # Not W&B's own steps: it drops those that a resumed run repeats.
  run.define_metric("step")
  run.define_metric("*", step_metric="step")
  return ServiceWriter(
    "wandb",
    lambda step, values: run.log({"step": step, **values}),
    wandb.Image,
    lambda failed: run.finish(exit_code=int(failed)),
  )


def _trackio(
  path: epath.Path, identity: str, config: dict[str, Any]
) -> ServiceWriter:
  import trackio

  # It finds a run by its name, which must be this workdir's alone.
  run = trackio.init(
    os.environ.get("TRACKIO_PROJECT", PROJECT),
    name=f"{path.name}-{identity}",
    config=config,
    resume="allow",
    embed=False,
  )
  return ServiceWriter(
    "trackio",
    lambda step, values: run.log(values, step=step),
    trackio.Image,
    # Not the run's own: it would end again at exit.
    lambda failed: trackio.finish(),
  )

"""A page to look at images: python -m drift_jax.serve --from=SOURCE

  python -m drift_jax.serve --from=runs/digits
  python -m drift_jax.serve --from=export --port=0
  python -m drift_jax.serve --from=hf://NAME --vae=weights/vae

Everything is compiled before the port opens. Ctrl-C or SIGTERM ends it.
"""

import os
import re
import signal
import socket
import sys
from types import FrameType
from typing import NoReturn

from absl import app, flags

from drift_jax import config as config_lib
from drift_jax import console, experiment, numerics, paths, sampling, serve
from drift_jax.console import logger

_FROM = paths.define_flag(
  "from",
  None,
  "A run's workdir, an export, an artifact's folder, hf://NAME of the authors' "
  "release or hf://OWNER/NAME[@REVISION][/FOLDER].",
)
_WORKDIR = paths.define_flag("workdir", None, "The same, of a run.")
_VAE = paths.define_flag(
  "vae",
  "",
  "Of an artifact: the autoencoder behind its latents; of a run where it is "
  "now, if it is not found.",
)
_STEP = flags.DEFINE_integer(
  "step",
  None,
  "Of a run: checkpoint; the best one, else the newest, if not given.",
)
_EMA_DECAY = flags.DEFINE_float(
  "ema_decay", None, "Of a run: which EMA; the evaluated one if not given."
)
_HOST = flags.DEFINE_string(
  "host", "127.0.0.1", "Address to listen on; 0.0.0.0: all of this machine's."
)
_PORT = flags.DEFINE_integer(
  "port", 8000, "0: a free one.", lower_bound=0, upper_bound=65535
)
_ALLOWED_HOSTS = flags.DEFINE_list(
  "allowed_hosts",
  [],
  "Names by which browsers reach it, beside localhost and --host.",
)
_ROOT_PATH = flags.DEFINE_string(
  "root_path",
  "",
  "/PREFIX at which a proxy shows it, if the proxy passes the prefix on.",
)
_BATCH_SIZES = flags.DEFINE_list(
  "batch_sizes",
  ["1", "8", "32"],
  "The only ones that are compiled; filled up to a multiple of the devices.",
)
_MAX_IMAGES = flags.DEFINE_integer(
  "max_images", 256, "Of one request.", lower_bound=1
)
_MAX_WAITING = flags.DEFINE_integer(
  "max_waiting", 8, "Requests beside the one that is drawn.", lower_bound=0
)
_PER_MINUTE = flags.DEFINE_integer(
  "requests_per_minute", 60, "Of one address.", lower_bound=1
)


def parse_sizes(values: list[str]) -> list[int]:
  """Batch sizes of the flag; ConfigError names the entry that is none."""
  wrong = [value for value in values if not value.isdecimal() or not int(value)]
  if wrong or not values:
    raise config_lib.ConfigError(
      f"--batch_sizes={','.join(values)}: {wrong[:1] or values} must be at "
      "least one integer, each at least 1"
    )
  return [int(value) for value in values]


def parse_root_path(value: str) -> str:
  """The flag's prefix; ConfigError if it is no path."""
  if value and not re.fullmatch(r"(/[\w.~@-]+)+/?", value):
    raise config_lib.ConfigError(
      f"--root_path={value} must be a path like /user/me/images"
    )
  return value


def bind(host: str, port: int) -> socket.socket:
  """A socket that nobody else listens on; ConfigError names what is wrong."""
  if not host:
    raise config_lib.ConfigError(
      "--host= is empty: 0.0.0.0 means all addresses"
    )
  try:
    ((family, kind, protocol, _, address), *_) = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    found = socket.socket(family, kind, protocol)
    try:
      found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      found.bind(address)
    except OSError:
      found.close()
      raise
  except OSError as error:
    raise config_lib.ConfigError(
      f"--host={host} --port={port}: {error.strerror or error} (--port=0 takes "
      "a free one)"
    ) from error
  return found


def main(argv: list[str]) -> None:
  """Serves until it is told to end."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  console.setup()
  numerics.pin()

  def stop(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise KeyboardInterrupt

  signal.signal(signal.SIGTERM, stop)
  try:
    _run()
  except experiment.ERRORS as error:
    sys.exit(f"Error: {error}")
  except KeyboardInterrupt:
    pass
  logger.info("Stopped.")


def _run() -> None:
  source = sampling.source_of(_FROM.value, _WORKDIR.value)
  sizes = parse_sizes(_BATCH_SIZES.value)
  root_path = parse_root_path(_ROOT_PATH.value)
  # Taken before anything takes time; nobody can connect until it listens.
  with bind(_HOST.value, _PORT.value) as listener:
    model = sampling.load(
      source, vae=_VAE.value, step=_STEP.value, ema_decay=_EMA_DECAY.value
    )
    worker = serve.Worker(model, sizes, _MAX_WAITING.value)
    logger.info("Compiling for batches of %s.", list(worker.batch_sizes))
    worker.warm_up()
    worker.start()
    host = f"[{_HOST.value}]" if ":" in _HOST.value else _HOST.value
    application = serve.make_app(
      model,
      worker,
      serve.Limits(_MAX_IMAGES.value, _PER_MINUTE.value),
      name=os.path.basename(source.rstrip("/")),
      hosts=[host, *_ALLOWED_HOSTS.value],
      root_path=root_path,
    )
    listener.listen()
    port = listener.getsockname()[1]
    logger.info("Serving %s on http://%s:%d (Ctrl-C ends).", source, host, port)
    try:
      serve.make_server(application).run(sockets=[listener])
    finally:
      worker.stop()


if __name__ == "__main__":
  app.run(main, flags_parser=config_lib.parse_flags)

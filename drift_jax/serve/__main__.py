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
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from absl import app, flags

from drift_jax import config as config_lib


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
  config_lib.define_source_flags()
  flags.DEFINE_string(
    "host",
    "127.0.0.1",
    "Address to listen on; 0.0.0.0: all of this machine's.",
  )
  flags.DEFINE_integer(
    "port", 8000, "0: a free one.", lower_bound=0, upper_bound=65535
  )
  flags.DEFINE_list(
    "allowed_hosts",
    [],
    "Names by which browsers reach it, beside localhost and --host.",
  )
  flags.DEFINE_string(
    "root_path",
    "",
    "/PREFIX at which a proxy shows it, if the proxy passes the prefix on.",
  )
  flags.DEFINE_list(
    "batch_sizes",
    ["1", "8", "32"],
    "The only ones that are compiled; filled up to a multiple of the devices.",
  )
  flags.DEFINE_integer("max_images", 256, "Of one request.", lower_bound=1)
  flags.DEFINE_integer(
    "max_waiting", 8, "Requests beside the one that is drawn.", lower_bound=0
  )
  flags.DEFINE_integer(
    "requests_per_minute", 60, "Of one address.", lower_bound=1
  )


def parse_sizes(values: Sequence[str]) -> list[int]:
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
  values = flags.FLAGS
  try:
    source = config_lib.source()
    sizes = parse_sizes(values.batch_sizes)
    root_path = parse_root_path(values.root_path)
    # Taken before anything takes time; nobody can connect until it listens.
    listener = bind(values.host, values.port)
  except config_lib.ConfigError as error:
    sys.exit(f"Error: {error}")
  with listener:
    _serve(source, sizes, root_path, listener, values)


def _serve(
  source: str,
  sizes: Sequence[int],
  root_path: str,
  listener: socket.socket,
  values: flags.FlagValues,
) -> None:
  """What `main` does once the flags are read."""
  from drift_jax import sampling
  from drift_jax.serve import app as app_lib
  from drift_jax.serve import limits, server, worker
  from drift_jax.system import console, numerics
  from drift_jax.system.console import logger
  from drift_jax.system.errors import ERRORS

  console.setup()
  numerics.pin()

  def stop(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise KeyboardInterrupt

  def program() -> None:
    model = sampling.load(
      source, vae=values.vae, step=values.step, ema_decay=values.ema_decay
    )
    drawing = worker.Worker(model, sizes, values.max_waiting)
    logger.info("Compiling for batches of %s.", list(drawing.batch_sizes))
    drawing.warm_up()
    drawing.start()
    host = f"[{values.host}]" if ":" in values.host else values.host
    application = app_lib.make_app(
      model,
      drawing,
      limits.Limits(values.max_images, values.requests_per_minute),
      name=os.path.basename(source.rstrip("/")),
      hosts=[host, *values.allowed_hosts],
      root_path=root_path,
    )
    listener.listen()
    port = listener.getsockname()[1]
    logger.info("Serving %s on http://%s:%d (Ctrl-C ends).", source, host, port)
    try:
      server.make_server(application).run(sockets=[listener])
    finally:
      drawing.stop()

  signal.signal(signal.SIGTERM, stop)
  try:
    program()
  except ERRORS as error:
    sys.exit(f"Error: {error}")
  except KeyboardInterrupt:
    pass
  logger.info("Stopped.")


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=config_lib.parse_flags)

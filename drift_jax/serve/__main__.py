"""A page to look at images: python -m drift_jax.serve --from=SOURCE

  python -m drift_jax.serve --from=runs/digits
  python -m drift_jax.serve --from=export --port=0
  python -m drift_jax.serve --from=hf://latent_L_sota

Everything is compiled before the port opens. Ctrl-C or SIGTERM ends it.
"""

import contextlib
import re
import signal
import socket
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from absl import app, flags

from drift_jax import config as config_lib
from drift_jax.system import extras, programs, storage


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
  integer = flags.DEFINE_integer
  config_lib.define_generator_flags()
  flags.DEFINE_string(
    "host", "127.0.0.1", "Address to listen on; 0.0.0.0: all of this machine's."
  )
  integer("port", 8000, "0: a free one.", 0, 65535)
  flags.DEFINE_list(
    "allowed_hosts",
    [],
    "Names by which browsers reach it, beside localhost and --host.",
  )
  flags.DEFINE_string(
    "root_path", "", "/PREFIX at which a proxy shows it, if it passes that on."
  )
  flags.DEFINE_list(
    "batch_sizes",
    ["1", "8", "32"],
    "The only ones that are compiled; filled up to a multiple of the devices.",
  )
  integer("max_images", 256, "Of one request.", 1)
  integer("max_waiting", 8, "Requests beside the one that is drawn.", 0)
  integer("requests_per_minute", 60, "Of one address.", 1)


def parse_sizes(values: Sequence[str]) -> list[int]:
  """Batch sizes of the flag; ConfigError names the entry that is none."""
  wrong = [value for value in values if not value.isdecimal() or not int(value)]
  if wrong or not values:
    raise config_lib.ConfigError(
      f"--batch_sizes={','.join(values)}: {wrong[:1] or values} must be at "
      "least one integer, each at least 1"
    )
  return [int(value) for value in values]


def check_root_path(value: str) -> None:
  """Raises ConfigError for a prefix that is no path."""
  if value and not re.fullmatch(r"(/[\w.~@-]+)+/?", value):
    raise config_lib.ConfigError(
      f"--root_path={value} must be a path like /user/me/images"
    )


def bind(host: str, port: int) -> socket.socket:
  """A socket that nobody else listens on; ConfigError names what is wrong."""
  if not host:
    raise config_lib.ConfigError(
      "--host= is empty: 0.0.0.0 means all addresses"
    )
  try:
    (family, *_), *_ = socket.getaddrinfo(host, port, flags=socket.AI_PASSIVE)
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
  except OSError as error:
    raise config_lib.ConfigError(
      f"--host={host} --port={port}: {error.strerror or error} (--port=0 takes "
      "a free one)"
    ) from error
  return listener


def main(argv: list[str]) -> None:
  """Serves until it is told to end."""
  values = flags.FLAGS
  source = config_lib.source()
  with programs.checking(argv):
    sizes = parse_sizes(values.batch_sizes)
    check_root_path(values.root_path)
    extras.need("The page", "serve", "starlette", "uvicorn")
    # Taken before anything takes time; nobody can connect until it listens.
    listener = bind(values.host, values.port)
  programs.setup()
  from drift_jax.system import numerics
  from drift_jax.system.console import logger

  def stop(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise KeyboardInterrupt

  signal.signal(signal.SIGTERM, stop)
  with (
    listener,
    programs.checking(),
    contextlib.suppress(KeyboardInterrupt),
  ):
    numerics.keep_compiled()
    serve(source, sizes, listener, values)
  logger.info("Stopped.")


def serve(
  source: str,
  sizes: Sequence[int],
  listener: socket.socket,
  values: flags.FlagValues,
) -> None:
  """Compiles, listens, and answers until SIGINT or SIGTERM."""
  from drift_jax import sampling
  from drift_jax.serve import app as app_lib
  from drift_jax.serve import limits, server, worker
  from drift_jax.system.console import logger

  model = sampling.load(
    source, vae=values.vae, step=values.step, ema_decay=values.ema_decay
  )
  if model.condition_shape:
    raise config_lib.ConfigError(
      f"--from={source}: this generator needs a condition of shape "
      f"{model.condition_shape} for each image, which the page does not ask "
      "for: python -m drift_jax.sample --conditions=FILE.npz takes them"
    )
  if not model.are_images:
    raise config_lib.ConfigError(
      f"{source} makes arrays of shape {model.image_shape} that nothing here "
      "decodes, and a page shows images: python -m drift_jax.sample "
      "--out=FILE.npz writes them"
    )
  drawing = worker.Worker(model, sizes, values.max_waiting)
  logger.info("Compiling for batches of %s.", list(drawing.batch_sizes))
  drawing.warm_up()
  host = f"[{values.host}]" if ":" in values.host else values.host
  application = app_lib.make_app(
    model,
    drawing,
    limits.Limits(values.max_images, values.requests_per_minute),
    name="/".join(storage.without_scheme(source).strip("/").split("/")[-2:]),
    hosts=[host, *values.allowed_hosts],
    root_path=values.root_path,
  )
  listener.listen()
  port = listener.getsockname()[1]
  logger.info("Serving %s on http://%s:%d (Ctrl-C ends).", source, host, port)
  try:
    server.make_server(application).run(sockets=[listener])
  finally:
    drawing.stop()


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=config_lib.parse_flags)

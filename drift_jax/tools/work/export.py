"""Exports a generator: see drift_jax.tools.export."""

import contextlib
import functools
import importlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

import drift_jax
from drift_jax import config as config_lib
from drift_jax.metrics.writers import read_jsonl
from drift_jax.models import release
from drift_jax.models.precision import rounded
from drift_jax.system import options, sharding, storage
from drift_jax.system.devices import find_devices
from drift_jax.tasks.generator import samplers
from drift_jax.tasks.generator.restore import (
  OpenedGenerator,
  open_generator,
  sampling_task,
)
from drift_jax.tasks.generator.samplers import sample_step
from drift_jax.tasks.generator.step import GeneratorTask
from drift_jax.tools.work.rows import last_figures
from drift_jax.training import artifacts
from drift_jax.training.conversions import weight_files
from drift_jax.training.frozen import decoding

VERSION = 1
_PATHS = ("workdir", "weights", "vae")  # of provenance and options
_RUN = pathlib.Path(__file__).parents[1] / "run_export.py"


def export(
  source: str,
  out: str,
  *,
  vae: str = "",
  step: int | None = None,
  ema_decay: float | None = None,
  dtype: str | None = None,
  formats: Sequence[str] = ("stablehlo",),
  platforms: Sequence[str] = options.PLATFORMS,
) -> dict[str, Any]:
  """Writes an export; the folder appears when it is whole.

  Args:
    source, vae, step, ema_decay: see restore.open_generator.
    out: a folder that is not there yet.
    dtype: 'float32' or 'bfloat16' computation; None: as it was trained. With
      bfloat16, parameters that are used in it are stored in it.
    formats: beside the weights as safetensors, of options.FORMATS.
    platforms: that the functions are lowered for, of options.PLATFORMS.

  Returns:
    The manifest.

  Raises:
    ConfigError: a folder that is there, a missing converter.
    ArtifactError, CheckpointError: weights that can't be loaded.
  """
  lists = {"formats": [*formats], "platforms": [*platforms]}
  with _new_folder(out) as folder:
    # 1. The weights, in the precision of the computation
    mesh = sharding.make_mesh(1, 1, find_devices()[:1])
    opened = open_generator(
      source, mesh, vae=vae, step=step, ema_decay=ema_decay
    )
    model_config = dict(opened.model_config)
    if dtype is not None:
      model_config["use_bf16"] = dtype == "bfloat16"
    module: Any = release.describe("gen", model_config)[0]
    trained = jax.device_get(opened.params)
    facts = {
      "alpha_range": list(opened.alpha_range),
      "class_names": list(opened.class_names) or None,
      **({"arrays": True} if opened.arrays else {}),
    }
    trained_for = {"step": opened.step, "ema_decay": opened.ema_decay}
    save = functools.partial(
      artifacts.save,
      kind="gen",
      model_config=model_config,
      facts=facts,
      source=opened.provenance,
      **trained_for,
    )
    weights = {artifacts.EXPORTED: rounded(module, trained)}
    save(
      folder / artifacts.EXPORTED,
      params=weights[artifacts.EXPORTED],
      format="safetensors",
    )
    if "release" in formats:
      save(folder, params=jax.tree.map(lambda x: x.astype(np.float32), trained))
    decode = None
    if opened.vae is not None:
      decode = decoding(opened.vae)
      weights[artifacts.EXPORTED_VAE] = jax.device_get(opened.vae.params)
      _save_vae(folder, opened.vae, weights[artifacts.EXPORTED_VAE])
    # 2. Functions of them
    task = sampling_task(module, pixels=opened.task.pixels)
    made = _functions(task, decode)
    flatten = functools.partial(traverse_util.flatten_dict, sep="/")
    flat = {name: flatten(tree) for name, tree in weights.items()}
    functions: dict[str, Any] = {}
    if "onnx" in formats:
      _write_onnx(folder / "generate.onnx", made["generate"], flat)
    if "stablehlo" in formats:
      functions = _write_stablehlo(folder, made, flat, platforms)
      shutil.copyfile(_RUN, folder / "run.py")
    # 3. What there is
    if opened.config is not None:
      text = config_lib.to_json(opened.config)
      (folder / artifacts.RUN_CONFIG_FILE).write_text(text)
    manifest = {
      "format": VERSION,
      "drift_jax": drift_jax.__version__,
      "jax": jax.__version__,
      "dtype": str(module.dtype),
      "weights": {name: f"{name}/{artifacts.TENSORS_FILE}" for name in weights},
      "functions": functions,
      **_ranges(opened, task),
      **facts,
      **trained_for,
      "figures": _figures(opened),
      "provenance": as_recorded(opened.provenance),
      "options": as_recorded({"vae": vae, **lists}),
      "files": _checksums(folder),
    }
    text = json.dumps(manifest, indent=1)
    (folder / artifacts.MANIFEST_FILE).write_text(text)
  return manifest


def as_recorded(options: Mapping[str, Any]) -> dict[str, Any]:
  """Options or provenance as a manifest has them: paths hold anywhere."""
  return {
    name: absolute(value) if name in _PATHS and value else value
    for name, value in options.items()
  }


def absolute(source: str) -> str:
  """A path that holds in any folder, without needless parts; or an address."""
  return source if storage.is_remote(source) else os.path.abspath(source)


def _ranges(opened: OpenedGenerator, task: GeneratorTask) -> dict[str, Any]:
  """Arguments and results of the functions; ranges include both ends.

  Beyond them, images are NaN, or were not trained for.
  """
  return {
    "images": "float32 [b, height, width, channels] in [-1, 1]",
    "noise_shape": ["b", *task.noise_shape],
    "style_tokens": task.style_tokens,
    "style_vocab": task.style_vocab,
    **task.of_conditions(lambda shape: ["b", *shape]),
    "num_classes": opened.num_classes,
    "ranges": {
      "labels": [0, opened.num_classes - 1],
      "alpha": list(opened.alpha_range),
      "seed": [0, options.MAX_SEED],
      "style": [0, max(task.style_vocab - 1, 0)],
    },
  }


def _figures(opened: OpenedGenerator) -> dict[str, dict[str, float]] | None:
  """Figures of these weights and of real images, if their run has judged them.

  None for those of another average than the one that the run evaluates.
  """
  config = opened.config
  if config is None or opened.ema_decay != config.eval.ema_decay:
    return None
  file = epath.Path(opened.provenance["workdir"]) / "metrics.jsonl"
  records = read_jsonl(file) if file.exists() else []
  generated, real = last_figures(records, opened.step or 0)
  found = {"generated": generated, "real": real}
  return found if generated else None


def _save_vae(
  folder: pathlib.Path, vae: artifacts.Artifact, params: Any
) -> None:
  """Writes the autoencoder, with the precision in which it decodes."""
  module: Any = vae.module
  artifacts.save(
    folder / artifacts.EXPORTED_VAE,
    kind="vae",
    model_config={
      **vae.metadata["model_config"],
      "use_bf16": module.dtype == jnp.bfloat16,
    },
    params=params,
    step=None,
    ema_decay=None,
    source={"sha256": vae.sha256},
    format="safetensors",
  )


@contextlib.contextmanager
def _new_folder(out: str) -> Iterator[pathlib.Path]:
  """A temporary folder, which gets the name when all went well."""
  if storage.is_remote(out):
    raise config_lib.ConfigError(f"--out={out} must be a local folder: copy it")
  path = pathlib.Path(out)
  if path.exists():
    raise config_lib.ConfigError(f"--out={out} is there already: remove it")
  path.parent.mkdir(parents=True, exist_ok=True)
  folder = pathlib.Path(tempfile.mkdtemp(prefix=".export", dir=path.parent))
  try:
    yield folder
    folder.chmod(0o755)
    folder.rename(path)
  finally:
    shutil.rmtree(folder, ignore_errors=True)


class _Function(NamedTuple):
  """A function to export, and the shapes of its arguments after the weights."""

  call: Callable[..., jax.Array]
  arguments: dict[str, jax.ShapeDtypeStruct]


def _functions(
  task: GeneratorTask, decode: Callable[[Any, jax.Array], jax.Array] | None
) -> dict[str, _Function]:
  """By name, of a batch of any size."""

  def images(
    step: Callable[..., jax.Array], weights: Mapping[str, Any], *arrays: Any
  ) -> jax.Array:
    samples = step(_tree(weights[artifacts.EXPORTED]), *arrays)
    if decode is not None:
      samples = decode(_tree(weights[artifacts.EXPORTED_VAE]), samples)
    return samples.astype(jnp.float32)

  def sample(params: Any, labels: Any, alpha: Any, index: Any, *rest: Any):
    seed, style, *given = rest
    inputs = (labels, alpha, index, *given)
    return sample_step(params, *inputs, seed=seed, style=style, task=task)

  generate = functools.partial(samplers.generate, task=task)
  shape = jax.ShapeDtypeStruct
  (batch,) = jax.export.symbolic_shape("b")
  tokens = task.style_tokens
  of_each = {
    "labels": shape((batch,), jnp.int32),
    "alpha": shape((batch,), jnp.float32),
  }
  by_seed = {
    "index": shape((batch,), jnp.int32),
    "seed": shape((), jnp.uint32),
    "style": shape((tokens,), jnp.int32),
  }
  by_noise = {
    "noise": shape((batch, *task.noise_shape), jnp.float32),
    "style": shape((batch, tokens), jnp.int32),
  }
  conditions = task.of_conditions(
    lambda size: shape((batch, *size), jnp.float32)
  )
  return {
    name: _Function(functools.partial(images, call), inputs | conditions)
    for name, call, inputs in (
      ("sample", sample, of_each | by_seed),
      ("generate", generate, of_each | by_noise),
    )
  }


def _write_stablehlo(
  folder: pathlib.Path,
  functions: Mapping[str, _Function],
  weights: Mapping[str, Any],
  platforms: Sequence[str],
) -> dict[str, Any]:
  """Writes functions of (weights, ...); returns their part of the manifest."""
  described = {}
  for name, (call, arguments) in functions.items():
    exported = jax.export.export(jax.jit(call), platforms=list(platforms))(
      weights, *arguments.values()
    )
    file = f"{name}.stablehlo"
    (folder / file).write_bytes(exported.serialize())
    described[name] = {
      "file": file,
      "platforms": list(platforms),
      "arguments": {
        "weights": "{name of the weights: {name of the array: array}}",
        **{key: _described(x) for key, x in arguments.items()},
      },
      "result": _described(exported.out_avals[0]),
    }
  return described


def _write_onnx(
  path: pathlib.Path, function: _Function, weights: Mapping[str, Any]
) -> None:
  """Writes a function with its weights inside.

  Raises:
    ConfigError: the converter is not installed, or does not know this JAX.
  """
  try:
    converter = importlib.import_module("jax2onnx")
  except ImportError as error:
    # Its requirements want an older Orbax.
    raise config_lib.ConfigError(
      "formats='onnx': pip install onnx-ir && pip install --no-deps jax2onnx"
    ) from error
  arrays = jax.tree.map(jnp.asarray, weights)
  shapes = function.arguments.values()
  # Traced beforehand: what the converter puts in the place of jnp's functions
  # while it traces does not know Flax's loop over blocks.
  closed = jax.make_jaxpr(lambda *inputs: function.call(arrays, *inputs))(
    *shapes
  )
  try:
    converter.to_onnx(
      lambda *inputs: jax.extend.core.jaxpr_as_fun(closed)(*inputs)[0],
      inputs=list(shapes),
      input_names=list(function.arguments),
      output_names=["images"],
      model_name="drift_jax",
      return_mode="file",
      output_path=str(path),
    )
  except AttributeError as error:  # it uses JAX's private modules
    raise config_lib.ConfigError(
      f"formats='onnx': the converter jax2onnx fails with JAX "
      f"{jax.__version__} ({error}): take another version of either"
    ) from error


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
  return traverse_util.unflatten_dict(dict(flat), sep="/")


def _described(x: Any) -> str:
  return f"{x.dtype}[{', '.join(map(str, x.shape))}]"


def _checksums(folder: pathlib.Path) -> dict[str, Any]:
  """{path: size and SHA-256} of every file."""
  return {
    path.relative_to(folder).as_posix(): {
      "bytes": path.stat().st_size,
      "sha256": weight_files.sha256_of(path),
    }
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }

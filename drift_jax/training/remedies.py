"""How inputs that a run lacks are made or fetched, for messages."""

import os
import shlex
import sys
from typing import Any, NamedTuple

from drift_jax import config as config_lib
from drift_jax.config.sections import ImageConfig
from drift_jax.data.sources import SPLITS, imagenet_classes
from drift_jax.system import hub, options
from drift_jax.training import released
from drift_jax.training.inputs import LATENTS, Input

_TOOLS = "python -m drift_jax.tools"
# {what tools.convert_weights makes: (its name, arguments, size)}; the size is
# that of the weights, to be downloaded and on the disk.
_CONVERTED = {
  "vae": (
    "the autoencoder of latents",
    f"vae --from={released.AUTOENCODER}",
    "335 MB",
  ),
  "convnext": (
    "ConvNeXt-V2 base",
    "convnext --from=hf://timm/convnextv2_base.fcmae_ft_in22k_in1k",
    "351 MB",
  ),
  "moco": (
    "MoCo-v2's ResNet-50",
    "moco --from=moco_v2_800ep_pretrain.pth.tar",
    "94 MB",
  ),
  "simclr": (
    "SimCLR's ResNet-50",
    "simclr --from=resnet50-1x.pth",
    "94 MB",
  ),
  "inception": ("the Inception-v3 of FID", "inception", "95 MB"),
  "dinov2": (
    "DINOv2 L/14",
    "dinov2 --from=hf://facebook/dinov2-large",
    "1.21 GB",
  ),
}
_BASE_WIDTHS = (128, 256, 512, 1024)  # of ConvNeXt-V2 base
# ImageNet's two layouts, as configs/common.py names them, and the images of its
# splits.
_TFDS, _FOLDER = "tfds:imagenet2012", "folder:data/imagenet"
_COUNTS = {"train": 1_281_167, "val": 50_000, "validation": 50_000}
# Sides of the patches that encoders of pixels and of latents fold into a cell.
_PATCHES = {"pixel": 8, "latent": 1}
# Of each class, where images that are to be cached are not divided.
_HELD_OUT = 0.1


class Remedy(NamedTuple):
  """What is missing, its size, and commands or flags, any of which will do."""

  what: str
  size: str
  commands: tuple[str, ...]


def line(entry: Input, error: Exception, config: ImageConfig | None) -> str:
  """One line about an input: the remedy if it is not there, else the error.

  Args:
    entry: the input.
    error: that its check raised.
    config: of the run; None if there is none.
  """
  found = None if os.path.exists(entry.value) else _remedy(entry, config)
  if found is None:
    text = " ".join(str(error).split())
    named = text.startswith((entry.key.partition(".")[0], "hf://"))
    return text if named else f"{entry.key}: {text}"
  size = f" ({found.size})" if found.size else ""
  commands = ", or ".join(found.commands)
  return f"{entry.key}={entry.value!r}: {found.what}{size}: {commands}"


def _remedy(entry: Input, config: ImageConfig | None) -> Remedy | None:
  """The remedy of an input that is not there, if one is known."""
  section, name, *_ = f"{entry.key}..".split(".")
  if entry.value.startswith("hf:"):
    return None
  if section == "eval" and entry.key.endswith(".path"):
    return _converted(name, entry.value)
  if config is None:
    return None
  if section == "vae" and config.vae.model.get("latent_channels", 4) == 4:
    return _converted("vae", entry.value)
  if section == "encoders":
    return _encoder(entry, config)
  if section == "eval":
    return _statistics(name, entry.value, config)
  if entry.key == "data.source":
    return _data(entry, config)
  return None


def _converted(model: str, out: str) -> Remedy | None:
  if model not in _CONVERTED:
    return None
  what, arguments, size = _CONVERTED[model]
  command = f"{_TOOLS}.convert_weights {arguments} --out={shlex.quote(out)}"
  return Remedy(what, size, (command,))


def _encoder(entry: Input, config: Any) -> Remedy | None:
  """That of a published network, or of one that the config's file trains."""
  model = config.encoders[entry.key.split(".")[1]].model
  kind = model.get("kind")
  if kind == "resnet":
    plain = not any(model.get("image_mean", ()))
    kind = "simclr" if plain else "moco"
  if not kind:
    return _trained(entry)
  if kind == "convnext" and tuple(model["widths"]) != _BASE_WIDTHS:
    return None
  if kind != "mae":
    return _converted(kind, entry.value)
  # 32 x 32 cells, of latents or of patches.
  if config.model.input_size != 32 * model["input_patch_size"]:
    return None
  of = "latent" if model["in_channels"] == 4 else "pixel"
  width, fold = model["base_channels"], model["input_patch_size"]
  folder = ",folder" if _images(config)[0].startswith("folder:") else ""
  workdir = shlex.quote(entry.value.removesuffix("/encoder"))
  train = (
    f"python -m drift_jax.main --config=configs/mae_{of}.py:{width}%s{folder}"
    f" --workdir={workdir}"
  )
  what = f"the {of} encoder of width {width}"
  if (of, width, fold) == ("latent", 640, 2):
    return Remedy(f"{what} for 512 px", "", (train % "_512px",))
  for artifact in released.released():
    if artifact.name == f"mae_{of}_{width}" and fold == _PATCHES[of]:
      return Remedy(
        what,
        f"{artifact.gigabytes:g} GB",
        (f"--config.{entry.key}=hf://{artifact.name}", train % ""),
      )
  return None


def _trained(entry: Input) -> Remedy | None:
  """That of an encoder whose config is a variant of the command line's file.

  The file's variants are tried, as no config says which one trains it.
  """
  argument, overrides = config_lib.config_arguments(sys.argv[1:])
  if argument is None or not entry.value.endswith("/encoder"):
    return None
  file, _, variant = argument.partition(":")
  first, *others = variant.split(",")
  for names in (
    [f"{first}_encoder", *others],
    ["encoder", first, *others],
    ["encoder", *others],
  ):
    config = f"{file}:{','.join(filter(None, names))}"
    try:
      task = config_lib.load_config(config)["task"]
    except config_lib.ConfigError:
      continue
    if task == "mae":
      workdir = entry.value.removesuffix("/encoder")
      words = ["python", "-m", "drift_jax.main", f"--config={config}"]
      words += [f"--workdir={workdir}"]
      words += [
        f"--config.{key}={value}"
        for key, value in overrides.items()
        if key.startswith("data.")
      ]
      return Remedy("the encoder of this config", "", (shlex.join(words),))
  return None


def _images(config: ImageConfig) -> tuple[str, str]:
  """(source of a run's images, class order), as the tools take them."""
  data = config.data
  if not data.source.startswith(LATENTS):
    return data.source, data.class_order
  if config.model.num_classes != len(imagenet_classes()):
    return "folder:DIR", ""
  if data.test_split == "val":
    return _FOLDER, "imagenet"
  return _TFDS, ""


def _image_size(config: Any) -> int:
  """Side of a run's images in pixels."""
  data, vae = config.data, config.vae.model
  if data.source.startswith(LATENTS) and vae and config.task == "generator":
    return config.model.input_size * 2 ** (len(vae["widths"]) - 1)
  return data.image_size


def _statistics(judge: str, out: str, config: Any) -> Remedy:
  data, size = config.data, _image_size(config)
  flags = {
    "source": _images(config)[0],
    "split": data.train_split,
    "data_dir": data.data_dir,
    "image_size": size if size != 256 else "",
    "crop": data.crop if data.crop in options.CROPS[1:] else "",
    "channels": 1 if data.channels == 1 else "",
    "network": getattr(config.eval, judge).path,
    "out": out,
  }
  return Remedy(
    "statistics of the training images and features of 10 000",
    "116 MB" if judge == "inception" else "50 MB",
    (_command("reference_stats", flags),),
  )


def _data(entry: Input, config: ImageConfig) -> Remedy | None:
  data = config.data
  out = os.path.join(data.data_dir, data.source.removeprefix(LATENTS))
  if data.source.startswith(LATENTS) and not config.vae.path:
    flags = {"source": f"{options.ARRAYS_SOURCE}DIR", "split": entry.split}
    return Remedy(
      f"arrays of the split {entry.split!r}",
      "of any size",
      (_command("cache_latents", {**flags, "out": out}),),
    )
  if data.source.startswith(LATENTS):
    source, class_order = _images(config)
    is_imagenet = config.model.num_classes == len(imagenet_classes())
    size = _image_size(config)
    each = size**2 // 2  # bytes: moments of an image and of its mirror image
    count = _COUNTS.get(entry.split) if is_imagenet else None
    # A source that has both splits is not divided all the same.
    divided = not is_imagenet and SPLITS == (data.train_split, data.test_split)
    flags = {
      "source": source,
      "class_order": class_order,
      "split": entry.split,
      "held_out": _HELD_OUT if divided else "",
      "image_size": size if size != 256 else "",
      "vae": config.vae.path,
      "out": out,
    }
    return Remedy(
      f"the latents of the split {entry.split!r}",
      hub.in_bytes(count * each) if count else f"{hub.in_bytes(each)} an image",
      (_command("cache_latents", flags),),
    )
  if data.source == _TFDS:
    return Remedy(
      "ImageNet as ArrayRecord, of ILSVRC2012_img_train.tar and "
      "ILSVRC2012_img_val.tar in ~/tensorflow_datasets/downloads/manual",
      "155 GB, and as much again for the records",
      (
        'python -c "import tensorflow_datasets as tfds; '
        "tfds.builder('imagenet2012', "
        "file_format='array_record').download_and_prepare()\"",
      ),
    )
  kind = data.source.partition(":")[0]
  if kind in ("folder", "tar"):
    what = "the images, SPLIT/CLASS/FILE"
    size = "155 GB of ImageNet" if data.class_order else "of any size"
    return Remedy(
      what, size, (f"put them there, --config.data.source={kind}:PATH",)
    )
  return None


def _command(tool: str, flags: dict[str, Any]) -> str:
  given = [f"--{name}={value}" for name, value in flags.items() if value]
  return f"{_TOOLS}.{tool} {shlex.join(given)}"

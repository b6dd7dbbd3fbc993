"""Inception-v3 on this device, beside pytorch-fid's network in torch."""

import dataclasses
import functools
import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from benchmarks.timing import Case, Report
from drift_jax.models import release
from drift_jax.models.inception import IMAGE_SIZE, build_inception, preprocess
from drift_jax.training.conversions import inception as published
from drift_jax.training.conversions.layouts import published_shapes

# Of float32 without tensor cores, which the network asks for.
PEAK_FLOPS = {"H100": 67e12, "H200": 67e12, "A100": 19.5e12, "L4": 30.3e12}
# Relative; of features of the same pixels.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of the network, its square images and its batches: the published ones."""

  width: int = 16
  num_classes: int = 1008
  pixels: int = 256
  batches: Sequence[int] = (16, 32)


TINY = Sizes(width=1, num_classes=5, pixels=32, batches=(2,))


def find_torch() -> Any:
  """The module, None where it is not installed."""
  found = importlib.util.find_spec("torch")
  return importlib.import_module("torch") if found else None


def draw_parameters(width: int, num_classes: int) -> dict[str, np.ndarray]:
  """By path; of a scale that neither swells nor fades over the layers."""
  random = np.random.default_rng(0)
  shapes = release.parameter_shapes(
    "inception", {"width": width, "num_classes": num_classes}
  )
  params = {}
  for path, shape in shapes.items():
    scale = np.sqrt(6 / np.prod(shape[:-1])) if len(shape) > 1 else 0.2
    params[path] = random.uniform(-scale, scale, shape).astype(np.float32)
  return params


def state_dict(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """In pytorch-fid's names and layouts.

  The biases are those of the BatchNorms, which do nothing else.
  """
  weights = {}
  shapes = {path: value.shape for path, value in params.items()}
  entries = published.entries(shapes)
  for name, shape in published_shapes(entries, shapes).items():
    module, _, leaf = name.replace(".", "/").rpartition("/")
    if leaf == "weight" and len(shape) > 1:
      kernel = params[f"{module.removesuffix('/conv')}/kernel"]
      order = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
      weights[name] = np.ascontiguousarray(kernel.transpose(order))
    elif leaf == "bias":
      weights[name] = params[f"{module.removesuffix('/bn')}/bias"]
    else:
      value = {
        "weight": 1.0,
        "running_mean": 0.0,
        "running_var": 1 - published.BATCH_NORM_EPSILON,
      }[leaf]
      weights[name] = np.full(shape, value, np.float32)
  return weights


class PlainInception:
  """pytorch-fid's network in torch, in its eval mode, of any width.

  Written out because pytorch-fid imports torchvision, which is not everywhere.
  """

  def __init__(
    self, torch: Any, weights: Mapping[str, np.ndarray], device: str
  ):
    """On torch's device, with weights in pytorch-fid's names and layouts."""
    self._torch, self._device = torch, device
    self._functional = torch.nn.functional
    self._weights = {
      name: torch.tensor(value, device=device)
      for name, value in weights.items()
    }

  def fetched(
    self, images: np.ndarray, *, resized: bool = False
  ) -> list[np.ndarray]:
    """Images from the host, features and logits to the host.

    Args:
      images: uint8 [B, 3, H, W]; if resized, what `network` takes.
      resized: whether they are preprocessed.
    """
    with self._torch.no_grad():
      x = self._torch.from_numpy(images).to(self._device)
      output = self.network(x) if resized else self(x)
      return [x.cpu().numpy() for x in output]

  def __call__(self, images: Any) -> tuple[Any, Any]:
    """(pool3, logits without bias) of uint8 [B, 3, H, W]."""
    pixels = self._functional.interpolate(
      images.float() / 255,
      size=(IMAGE_SIZE, IMAGE_SIZE),
      mode="bilinear",
      align_corners=False,
    )
    return self.network(2 * pixels - 1)

  def network(self, x: Any) -> tuple[Any, Any]:
    """The same of pixels [B, 3, 299, 299] in [-1, 1]."""
    x = self._conv(x, "Conv2d_1a_3x3", stride=2)
    x = self._conv(x, "Conv2d_2a_3x3", valid=True)
    x = self._conv(x, "Conv2d_2b_3x3")
    x = self._functional.max_pool2d(x, 3, 2)
    x = self._conv(x, "Conv2d_3b_1x1")
    x = self._conv(x, "Conv2d_4a_3x3", valid=True)
    x = self._functional.max_pool2d(x, 3, 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
      x = self._block_a(x, block)
    x = self._block_b(x, "Mixed_6a")
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
      x = self._block_c(x, block)
    x = self._block_d(x, "Mixed_7a")
    x = self._block_e(x, "Mixed_7b", self._mean_pool)
    x = self._block_e(
      x, "Mixed_7c", lambda x: self._functional.max_pool2d(x, 3, 1, 1)
    )
    pool3 = self._functional.adaptive_avg_pool2d(x, (1, 1)).flatten(1)
    return pool3, self._functional.linear(pool3, self._weights["fc.weight"])

  def _conv(
    self, x: Any, name: str, *, stride: int = 1, valid: bool = False
  ) -> Any:
    """Convolution, BatchNorm, relu."""
    kernel = self._weights[f"{name}.conv.weight"]
    same = stride == 1 and not valid
    padding = [side // 2 if same else 0 for side in kernel.shape[2:]]
    x = self._functional.conv2d(x, kernel, None, stride, padding)
    x = self._functional.batch_norm(
      x,
      *(
        self._weights[f"{name}.bn.{leaf}"]
        for leaf in ("running_mean", "running_var", "weight", "bias")
      ),
      training=False,
      eps=published.BATCH_NORM_EPSILON,
    )
    return self._functional.relu(x, inplace=True)

  def _chain(self, x: Any, block: str, *names: str, stride: int = 1) -> Any:
    """One convolution after the other; the last one has the stride."""
    for name in names[:-1]:
      x = self._conv(x, f"{block}.{name}")
    return self._conv(x, f"{block}.{names[-1]}", stride=stride)

  def _numbered(
    self, x: Any, block: str, name: str, count: int, stride: int = 1
  ) -> Any:
    names = [f"{name}_{i}" for i in range(1, count + 1)]
    return self._chain(x, block, *names, stride=stride)

  def _mean_pool(self, x: Any) -> Any:
    return self._functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

  def _joined(self, *branches: Any) -> Any:
    return self._torch.cat(branches, 1)

  def _block_a(self, x: Any, block: str) -> Any:
    return self._joined(
      self._chain(x, block, "branch1x1"),
      self._numbered(x, block, "branch5x5", 2),
      self._numbered(x, block, "branch3x3dbl", 3),
      self._chain(self._mean_pool(x), block, "branch_pool"),
    )

  def _block_b(self, x: Any, block: str) -> Any:
    return self._joined(
      self._chain(x, block, "branch3x3", stride=2),
      self._numbered(x, block, "branch3x3dbl", 3, 2),
      self._functional.max_pool2d(x, 3, 2),
    )

  def _block_c(self, x: Any, block: str) -> Any:
    return self._joined(
      self._chain(x, block, "branch1x1"),
      self._numbered(x, block, "branch7x7", 3),
      self._numbered(x, block, "branch7x7dbl", 5),
      self._chain(self._mean_pool(x), block, "branch_pool"),
    )

  def _block_d(self, x: Any, block: str) -> Any:
    return self._joined(
      self._numbered(x, block, "branch3x3", 2, 2),
      self._numbered(x, block, "branch7x7x3", 4, 2),
      self._functional.max_pool2d(x, 3, 2),
    )

  def _block_e(self, x: Any, block: str, pool: Callable[[Any], Any]) -> Any:
    three = self._chain(x, block, "branch3x3_1")
    double = self._numbered(x, block, "branch3x3dbl", 2)
    return self._joined(
      self._chain(x, block, "branch1x1"),
      self._chain(three, block, "branch3x3_2a"),
      self._chain(three, block, "branch3x3_2b"),
      self._chain(double, block, "branch3x3dbl_3a"),
      self._chain(double, block, "branch3x3dbl_3b"),
      self._chain(pool(x), block, "branch_pool"),
    )


def plain_network(
  params: Mapping[str, np.ndarray],
) -> tuple[PlainInception | None, str]:
  """(torch's network, if there is a torch for this device; a note)."""
  torch = find_torch()
  if torch is None:
    return None, "torch is not installed: nothing to compare with"
  device = "cpu" if jax.default_backend() == "cpu" else "cuda"
  if device == "cuda" and not torch.cuda.is_available():
    return None, "torch knows no such device: nothing to compare with"
  threads = cores()
  torch.set_num_threads(threads)
  torch.backends.cudnn.allow_tf32 = False  # Ours is of full float32, too.
  network = PlainInception(torch, state_dict(params), device)
  note = f"plain: pytorch-fid's network in torch {torch.__version__}"
  note += f", {threads} threads" if device == "cpu" else ""
  return network, note


def cores() -> int:
  """That this process may use."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:  # not on macOS
    return os.cpu_count() or 1


def rows(
  report: Report,
  *,
  width: int,
  num_classes: int,
  size: int,
  batches: Sequence[int],
) -> None:
  """Adds, for each size of batches, the speed and what it costs.

  Args:
    report: gets the rows.
    width, num_classes: of the network; 16 and 1008 are the published ones.
    size: pixels of the square images.
    batches: sizes.

  Raises:
    ValueError: when torch's features are others.
  """
  params = draw_parameters(width, num_classes)
  network = build_inception(width=width, num_classes=num_classes)
  variables = jax.device_put(
    {"params": traverse_util.unflatten_dict(params, sep="/")}
  )
  apply = jax.jit(lambda v, x: network.apply(v, x)[:2])
  plain, note = plain_network(params)
  section = f"Inception-v3 of width {width}, {size} x {size} px, float32"
  for batch in batches:
    name = f"batch of {batch}"
    random = np.random.default_rng(batch)
    images = random.integers(0, 256, (batch, size, size, 3), np.uint8)
    start = time.perf_counter()
    compiled = apply.lower(variables, images).compile()
    compilation = time.perf_counter() - start
    run = functools.partial(_fetched, compiled, variables, images)
    case = None
    if plain is not None:
      agreement = _agreement(plain, run()[0], preprocess(images))
      planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
      case = Case(functools.partial(plain.fetched, planes))
    report.compare(
      section,
      "images/s",
      batch,
      case,
      {name: Case(run)},
      notes={name: note if case is None else f"{note}; {agreement}"},
    )
    flops = compiled.cost_analysis()["flops"]
    speed = flops * report.rows[-1].value / batch
    report.add(
      section,
      f"{name}: operations",
      "GFLOP/s",
      speed / 1e9,
      note=f"{flops / batch / 1e9:.3g} GFLOP for each image, by XLA's count",
    )
    kind = jax.devices()[0].device_kind
    for peak in (v for k, v in PEAK_FLOPS.items() if k in kind.split()):
      report.add(
        section,
        f"{name}: of the peak",
        "%",
        100 * speed / peak,
        note=f"{peak / 1e12:g} TFLOP/s, float32 without tensor cores",
      )
    memory = compiled.memory_analysis()
    report.add(
      section,
      f"{name}: temporary memory",
      "MB",
      memory.temp_size_in_bytes / 1e6,
      note=f"beside {memory.argument_size_in_bytes / 1e6:.0f} MB of parameters"
      " and images",
    )
    report.add(section, f"{name}: compilation", "s", compilation)


def _fetched(
  compiled: Callable[..., Any], variables: Any, images: np.ndarray
) -> list[np.ndarray]:
  """Images from the host, features and logits to the host."""
  return [np.asarray(x) for x in compiled(variables, images)]


def _agreement(
  plain: PlainInception, pool3: np.ndarray, pixels: jax.Array
) -> str:
  """Says how far the features of both are apart, of the same pixels."""
  planes = np.ascontiguousarray(np.asarray(pixels).transpose(0, 3, 1, 2))
  expected, _ = plain.fetched(planes, resized=True)
  error = np.linalg.norm(pool3 - expected) / np.linalg.norm(expected)
  if not error <= TOLERANCE:
    raise ValueError(
      f"features of ours and of torch differ by {error:.2g} (relative): they"
      " are not of the same network"
    )
  return f"features of the same pixels agree to {error:.0e} (relative)"

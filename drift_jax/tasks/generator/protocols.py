"""How published figures of ImageNet at 256 px were measured, by name.

drift_jax.evaluate --protocol=NAME does the same, and its report says where it
did not. docs/evaluation.md has them as a table.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from drift_jax.system import options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """How samples are drawn, and what they are compared with.

  Attributes:
    statistics: published file of mean and covariance.
    singles: published file of the single images of precision and recall; '' if
      it has neither figure.
    pixels, label_order: see options.
    shuffle: whether the Inception score's parts are of shuffled samples.
    alphas: guidance scales; None where each model has its own.
    more_alphas: those of single models.
    metrics: figures.
    per_class: samples of each class, for each alpha.
  """

  statistics: str
  singles: str
  pixels: options.Pixels
  label_order: options.LabelOrder
  shuffle: bool
  alphas: tuple[float, ...] | None
  metrics: tuple[str, ...]
  more_alphas: tuple[float, ...] = ()
  per_class: int = 50


PROTOCOLS: Mapping[str, Protocol] = {
  # Of arXiv:2602.04770. Its ablation has (1, 1.5, 2, 2.5, 3, 3.5).
  "drifting": Protocol(
    statistics="imagenet_256_fid_stats.npz",
    singles="imagenet_val_prc_arr0.npz",
    pixels="truncate",
    label_order="given",
    shuffle=True,
    alphas=(1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5),
    more_alphas=(1.5,),
    metrics=("fid", "inception_score", "precision_recall"),
  ),
  # Of arXiv:2605.11755; the alphas of its XL/2, L/2, B/2 and ablation.
  "wflow": Protocol(
    statistics="jit_in256_stats.npz",
    singles="",
    pixels="round",
    label_order="class",
    shuffle=True,
    alphas=(1.09, 1.14, 1.19, 1.5),
    metrics=("fid", "inception_score"),
  ),
  # Of arXiv:2105.05233, but for sFID. The single images are in the same file.
  "adm": Protocol(
    statistics="VIRTUAL_imagenet256_labeled.npz",
    singles="VIRTUAL_imagenet256_labeled.npz",
    pixels="truncate",
    label_order="given",
    shuffle=False,
    alphas=None,
    metrics=("fid", "inception_score", "precision_recall"),
  ),
}


def of_request(name: str) -> dict[str, Any]:
  """Arguments of reports.Request that a protocol sets."""
  protocol = PROTOCOLS[name]
  names = ("pixels", "label_order", "alphas", "metrics")
  values = {key: getattr(protocol, key) for key in names}
  return {"protocol": name, "labels": "", **values}


def described(
  name: str,
  *,
  samples: Mapping[str, Any],
  metrics: Sequence[str],
  reference: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """What a report says of its protocol.

  Args:
    name: key of PROTOCOLS.
    samples: what was used of 'pixels', 'label_order', 'per_class', 'alphas';
      empty for images that were made elsewhere.
    metrics: figures that were computed.
    reference: what a report says of the statistics; None if there are none.

  Returns:
    'name', all that was used, and 'differs': what is not the protocol's, or
    what nobody knows, one text each. Fewer alphas or figures are no difference.
  """
  protocol = PROTOCOLS[name]
  used = {**samples, "metrics": tuple(metrics), "shuffle": protocol.shuffle}
  differs = []
  for key, value in used.items():
    wanted = getattr(protocol, key)
    known = protocol.more_alphas if key == "alphas" else ()
    same = value == wanted
    if isinstance(wanted, tuple):
      same = set(value) <= {*wanted, *known}
    if wanted is not None and not same:
      differs.append(f"{key}: {value}, the protocol has {wanted}")
  if not samples:
    differs.append("labels, their order, pixels and alpha: as the images are")
  files = [protocol.statistics] * ("fid" in metrics)
  files += [protocol.singles] * ("precision_recall" in metrics)
  found = reference or {}
  named = [pathlib.PurePath(found.get("path", "")).name]
  named += [(found.get("provenance") or {}).get("source", "")]
  differs += [
    f"statistics: {found.get('path')}, the protocol has {file}"
    for file in dict.fromkeys(filter(None, files))
    if not any(file in text for text in named)
  ]
  return {"name": name, **used, "reference": reference, "differs": differs}

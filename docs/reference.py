"""Hooks of mkdocs: names of the reference, equations of docstrings.

mkdocs calls the functions `on_...`; the docstrings' reader calls Equations.
"""

import importlib
import re
from typing import Any

import griffe

_MARK = re.compile(r"^<!-- (:::|names of) (\S+) -->$", re.MULTILINE)
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")


def on_page_markdown(markdown: str, **_: Any) -> str:
  """Pages as mkdocs reads them: reference.md's marks, pipes in tables' code."""
  markdown = _MARK.sub(
    lambda mark: f"::: {mark[2]}" if mark[1] == ":::" else _names(mark[2]),
    markdown,
  )
  # GitHub wants a pipe escaped there, Python-Markdown shows the backslash.
  return re.sub(
    r"^\|.*$",
    lambda row: re.sub(
      r"`[^`]*`", lambda code: code[0].replace(r"\|", "|"), row[0]
    ),
    markdown,
    flags=re.MULTILINE,
  )


def _names(package: str) -> str:
  """mkdocstrings' directive of each public name of a package.

  `_NAMES` of the package says which module defines which.
  """
  blocks = []
  for module, names in importlib.import_module(package)._NAMES.items():
    # Modules of other packages are named from the root on.
    home = f"drift_jax.{module}" if "." in module else f"{package}.{module}"
    for name in names:
      path = home if home.endswith(f".{name}") else f"{home}.{name}"
      blocks.append(
        f"::: {path}\n    options:\n"
        f"      heading: {package}.{name}\n      toc_label: {name}"
      )
  return "\n\n".join(blocks)


class Equations(griffe.Extension):
  """Shows the indented lines of a docstring's text as they are."""

  def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
    if obj.docstring is not None:
      obj.docstring.value = blocks(obj.docstring.value)


def blocks(docstring: str) -> str:
  """The docstring with its indented lines as blocks of code."""
  # Markdown takes hf://OWNER/NAME[@REVISION][/FOLDER] for a link.
  lines, out = docstring.replace("][", "]\\[").splitlines(), []
  for number, line in enumerate(lines):
    if _SECTION.match(line):
      return "\n".join([*out, *lines[number:]])
    inside = line.startswith("  ")
    if out and inside != out[-1].startswith("    ") and line and out[-1]:
      out.append("")
    out.append("  " + line if inside else line)
  return "\n".join(out)

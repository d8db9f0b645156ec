"""What MkDocs does for this site beyond its plugins: formulas become MathML, notebooks become pages.

Both happen when the site is built, so that a page needs neither a script nor a network to be read.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
FENCE = "`" * 4


class Notebook(File):
    """A notebook, which is a page of the site."""

    def is_documentation_page(self) -> bool:
        """Whether the file becomes a page, rather than a copy."""
        return True


def on_files(files: Files, config: Any) -> Files:
    """Make every notebook a page."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            files.append(Notebook(file.src_uri, config.docs_dir, config.site_dir, config.use_directory_urls))
    return files


def on_page_read_source(page: Any, config: Any) -> str | None:
    """The Markdown of a notebook; other pages are read as ever."""
    return as_markdown(Path(page.file.abs_src_path)) if isinstance(page.file, Notebook) else None


def as_markdown(path: Path) -> str:
    """The cells of a notebook, and what they printed and drew, as Markdown."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(part for cell in cells for part in _parts(cell, path))


def _parts(cell: dict[str, Any], path: Path) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    parts = [f"{FENCE}python\n{source}\n{FENCE}"]
    for output in cell["outputs"]:
        picture = output.get("data", {}).get("image/png")
        if output["output_type"] == "stream":
            parts.append(f"{FENCE}text\n{''.join(output['text']).rstrip()}\n{FENCE}")
        elif picture is None or "alt" not in cell["metadata"]:
            raise PluginError(
                f"{path}: print what a cell shows, or draw it and say in its metadata what is seen (alt)"
            )
        else:
            parts.append(f"![{cell['metadata']['alt']}](data:image/png;base64,{''.join(picture.split())})")
    return parts


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Turn every formula into MathML, which browsers show without help."""
    return FORMULA.sub(_mathml, content)


def _mathml(formula: re.Match[str]) -> str:
    display = "inline" if formula[2] == "(" else "block"
    mathml = convert(html.unescape(formula[3]).strip(), display=display)
    return mathml if display == "inline" else f'<div class="formula">{mathml}</div>'

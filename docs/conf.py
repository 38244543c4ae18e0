"""Configuration of the manual: `python -m sphinx -W docs docs/_build/html`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsso._version import __version__

project = "dsso"
author = "the dsso authors"
copyright = "the dsso authors, Apache License 2.0"
release = version = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_parser"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Shapes", "params_style"), ("Units", "params_style"), "Source"]
# Links to classes of torch and of the standard library have no target here.
nitpicky = False

html_theme = "alabaster"
html_title = f"dsso {release}"
html_theme_options = {
    "description": "Second-order and zeroth-order optimization of large transformers inside ZeRO, FSDP2 and DDP",
    "page_width": "1100px",
    "sidebar_width": "230px",
    "fixed_sidebar": True,
}
html_static_path: list[str] = []

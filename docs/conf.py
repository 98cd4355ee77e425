"""Sphinx configuration: `make docs` builds these pages into docs/_build/html, and takes warnings for errors."""

from __future__ import annotations

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import config_reference  # noqa: E402

import nfjax  # noqa: E402

project = "nfjax"
author = "the developers of nfjax"
copyright = "the developers of nfjax, Apache-2.0"
version = release = nfjax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
nitpicky = False
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests execute the notebooks; what they show here is what they were committed with

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "sphinx_book_theme"
html_title = "nfjax"
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
}
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["nfjax.css"]
copybutton_exclude = ".linenos, .gp, .go"

# The reference of the settings is made from nfjax/config.py at every build.
config_reference.write(HERE / "reference" / "config.md")

"""Sphinx configuration: `make docs` builds these pages into docs/_build/html, and takes warnings for errors."""

from __future__ import annotations

import inspect
import pathlib
import re
import sys

from docutils import nodes
from sphinx.util.inspect import stringify_signature

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import command_reference  # noqa: E402
import config_reference  # noqa: E402
import name_reference  # noqa: E402

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
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
autoclass_content = "both"  # what __init__ takes stands in its docstring
default_role = "py:obj"  # `name` in a docstring: a link where there is something of this name, else code
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as one list, not each with a heading
napoleon_attr_annotations = False  # their docstrings say what they are

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

# Settings, commands and names are written down by the code itself, at every build.
for name, page in (("config", config_reference), ("commands", command_reference), ("names", name_reference)):
    path, text = HERE / "reference" / f"{name}.md", page.markdown()
    if not path.exists() or path.read_text() != text:  # Sphinx reads a page again only when it has changed
        path.write_text(text)


def separate_code(app, what, name, thing, options, lines):
    """`name`s of a docstring: reStructuredText wants a separator between the code and the letter behind it."""
    lines[:] = re.sub(r"`([^`]+)`(?=\w)", r"`\1`\\ ", "\n".join(lines)).split("\n")


def constructor(app, what, name, thing, options, signature, returns):
    """What an NNX module is built with, which its metaclass hides; a protocol is not built at all."""
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    if getattr(thing, "_is_protocol", False):
        return "", returns
    parameters = list(inspect.signature(thing.__init__).parameters.values())[1:]  # without self
    own = inspect.Signature([p.replace(default=Named(p.default)) if _is_named(p.default) else p for p in parameters])
    return stringify_signature(own, show_annotation=False), returns


class Named:
    """A default that is a function or a class, shown by its name."""

    def __init__(self, thing):
        self.name = thing.__name__

    def __repr__(self):
        return self.name


def _is_named(default):
    return callable(default) and default is not inspect.Parameter.empty and hasattr(default, "__name__")


def mark_long_code(app, doctree):
    """Gives code in a sentence the class "long" where one word of it may be wider than a phone."""
    for node in doctree.findall(nodes.literal):
        if max(map(len, node.astext().split()), default=0) > 36:
            node["classes"].append("long")


def setup(app):
    app.connect("autodoc-process-docstring", separate_code)
    app.connect("autodoc-process-signature", constructor)
    app.connect("doctree-read", mark_long_code)

"""Sphinx configuration: `make docs` builds the pages of this folder and the API reference."""

from jax_fa3 import __version__

project = "jax_fa3"
author = "the jax_fa3 authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"jax_fa3 {__version__}"
# Pages link to files outside of docs, so the source folder is the repository.
root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/**.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
exclude_patterns = [".*", "build", "dist"]

myst_heading_anchors = 3  # the anchors that code hosts give to headings

default_role = "code"  # docstrings put code in single backticks
autodoc_typehints = "none"  # docstrings say shapes and dtypes
autodoc_member_order = "bysource"
napoleon_custom_sections = ["Communication", "Derivative", "Letters", "Numerics", "Source"]

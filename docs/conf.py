"""Configuration of the documentation site, which `make docs` builds with Sphinx."""

import os
import sys
from pathlib import Path

import parity

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "docs" / "extension"), str(ROOT / "scripts")]
os.environ.setdefault("GPT_PARITY_OFFLINE", "1")  # a notebook downloads nothing

project = "gpt-parity"
author = "The gpt-parity maintainers"
copyright = f"2026, {author}"
version = release = parity.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_design",
    "sphinx_copybutton",
    "framework_tabs",
    "name_directive",
    "program_directive",
    "site_check",
]
# The percent scripts are the source of the notebooks; their copies with outputs are for the code host.
exclude_patterns = ["*.ipynb", "conf.py", "execute.py", "extension/*", "notebooks/*.ipynb"]
highlight_language = "text"

# Markdown. The files are read on the code host as well, where a fence of colons is text and a link is relative.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

# Notebooks are percent scripts. A cell that fails is a warning, and so an error of `make docs`.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_show_tb = True
nb_execution_in_temp = True
nb_execution_timeout = 600  # seconds per cell
nb_ipywidgets_js = {}  # would be loaded from another host

# Docstrings are in Google style; text in single backquotes is code, which links to the name if the site has it.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 80
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "gpt-parity"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False

"""What shapes the site, see https://www.sphinx-doc.org."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "Matrix-free second-order optimization"
author = "The cgn-tutorial authors"
project_copyright = f"2026, {author}"
version = release = runpy.run_path("../src/version.py")["VERSION"]
wheel = f"cgn_tutorial-{version}-py3-none-any.whl"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "defaults",
    "diff_names",
    "fold",
    "gallery",
    "head",
    "mathml",
    "proofs",
    "stacked_tables",
    "themed_image",
]
exclude_patterns = ["_build", "auto_examples/*.ipynb", "sg_execution_times.rst"]
default_role = "literal"
nitpicky = True
html_math_renderer = "mathml"

# Where other projects document the names in our signatures, in inventories of our own: no network.
intersphinx_mapping = {
    "matplotlib": ("https://matplotlib.org/stable", "inventories/matplotlib.inv"),
    "python": ("https://docs.python.org/3", "inventories/python.inv"),
    "torch": ("https://docs.pytorch.org/docs/stable", "inventories/torch.inv"),
}

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # nn.Sigmoid, not what it prints as
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Source", "notes_style")]

copybutton_exclude = ".linenos, .gp, .go"
copybutton_selector = "div:not(.sphx-glr-script-out) > div.highlight > pre, pre.literal-block"

# The repository's address, which a workflow knows; where nobody tells it, the site says nothing.
repository = os.environ.get("REPOSITORY_URL", "").rstrip("/")

# A notebook's first cell, with the address of the wheel, or its file's name where there is none.
site = os.environ.get("SITE_URL", "").rstrip("/")
html_baseurl = f"{site}/" if site else ""
install = f"""\
# Install the package where it is missing{"" if site else ", from its wheel beside this notebook"}.
from importlib import metadata

try:
    installed = metadata.version("cgn-tutorial")
except metadata.PackageNotFoundError:
    %pip install --quiet {html_baseurl}{wheel}
else:
    if installed != "{version}":
        print(f"cgn-tutorial {{installed}} is installed; this notebook ran with {version}.")
        print("To install that: %pip install {html_baseurl}{wheel}, and restart the kernel.")
"""

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"plot_",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("figures",),
    "capture_repr": (),
    "abort_on_example_error": True,
    "write_computation_times": False,
    "min_reported_time": 0,
    "parallel": 2,  # pages at a time, on one thread each: networks this small need no more
    "first_notebook_cell": install,
    "promote_jupyter_magic": False,
    "show_signature": False,
    "remove_config_comments": True,
    "doc_module": ("cgn_tutorial",),
    "backreferences_dir": "api/backreferences",
    "inspect_global_variables": False,
}

templates_path = ["_templates"]
html_context = {"default_mode": "light"}  # without scripts; with them, as the system has it
html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_extra_path = [
    "../src/cgn_tutorial/cgn.py",
    "../src/cgn_tutorial/curvature.py",
    "../src/cgn_tutorial/pages/train_parallel.py",
    *map(str, Path(__file__).parent.glob(f"_build/wheel/{wheel}")),  # built by nox
]
html_css_files = ["site.css"]
html_sidebars: dict[str, list[str]] = {
    page: [] for page in ("api", "benchmarks", "contributing", "experiments", "misuse", "notation")
}  # no subpages
rst_epilog = f"""
.. |wheel| replace:: {html_baseurl}{wheel}
.. _wheel: {wheel}
.. |the-wheel| replace:: {html_baseurl}{wheel}
.. _the-wheel: ../{wheel}
.. _repository: {repository or "index.html"}
"""
if repository:
    tags.add("repository")  # type: ignore[name-defined]  # noqa: F821, Sphinx defines it
html_domain_indices = False  # an index of two modules
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = (
    False  # summaries are fetched, which browsers refuse from the file system
)
html_theme_options = {
    "show_prev_next": True,
    "navbar_align": "left",
    "header_links_before_dropdown": 4,  # in one line from 1024 pixels on
    "navigation_with_keys": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "icon_links": [
        {"name": "Repository", "url": repository, "icon": "fa-solid fa-code-branch"},
    ]
    if repository
    else [],
}

linkcheck_ignore = ["(?!https?:)"]  # links within the site are followed by `nox -s site`

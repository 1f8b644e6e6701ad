"""How Sphinx builds the site: `make docs`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "extensions"), str(HERE.parent / "src"), str(HERE.parent)]

import tables  # noqa: E402

from sylinit.version import __version__  # noqa: E402

project = "sylinit"
author = "The sylinit developers"
copyright = "the sylinit developers, Apache-2.0"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "mathml",
]
exclude_patterns = ["tables/**"]
default_role = "code"
suppress_warnings = ["myst.header"]  # a page that is included begins where it is included

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "substitution", "attrs_inline"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
myst_substitutions = tables.write(HERE / "tables")

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_mock_imports = ["peft", "transformers", "lightning", "skorch"]
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 72

SIDEBAR = {
    "color-sidebar-link-text": "var(--color-foreground-secondary)",
    "color-sidebar-link-text--top-level": "var(--color-foreground-secondary)",
}

html_theme = "furo"
html_title = f"sylinit {__version__}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#b34700", "color-brand-content": "#a34100", **SIDEBAR},
    "dark_css_variables": {"color-brand-primary": "#ff9a52", "color-brand-content": "#ffa566", **SIDEBAR},
}
pygments_style = "friendly"
pygments_dark_style = "monokai"
copybutton_prompt_text = "$ "

FORMULA = re.compile(r"^(?: {4,}|\t)\S")
SECTION = re.compile(r"^(Args|Arguments|Attributes|Returns|Yields|Raises|Note|Example|Examples):$")


def literal_formulas(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Formulas that a docstring indents are shown as they stand."""
    found: list[str] = []
    section = False
    for place, line in enumerate(lines):
        section = section or bool(SECTION.match(line))
        begins = FORMULA.match(line) and (not found or not found[-1].strip())
        if not section and begins and not (place > 1 and lines[place - 2].endswith("::")):
            found += [".. code-block:: none", ""]
        found.append(line)
    lines[:] = found


def setup(app: object) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", literal_formulas, priority=1)  # type: ignore[attr-defined]

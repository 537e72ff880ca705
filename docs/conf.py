"""Sphinx configuration: `make docs` builds the site into build/docs."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "totalprop"
author = "totalprop contributors"
copyright = author
release = metadata.version("totalprop")

extensions = [
    "myst_nb",  # MyST, and notebooks with the outputs that are committed
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

html_theme = "furo"
html_title = "totalprop"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
pygments_style = "friendly"
pygments_dark_style = "monokai"

myst_enable_extensions = ["colon_fence"]
nb_execution_mode = "off"
myst_heading_anchors = 3

default_role = "code"  # docstrings write `name`, as in Markdown
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

# Every cross-reference must resolve, except into other projects, whose inventories would have to
# be downloaded, and to type variables, which have no page.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|dist|numpy|np|gym|gymnasium|stable_baselines3)\..*"),
    (r"py:.*", r"(collections|pathlib|io|typing)\..*"),
    (r"py:(class|obj)", r"\w+"),  # names of others, and aliases of types
    (r"py:(class|obj)", r".*\.(Self\w+|Agent|Function|Observations)"),
    (r"py:(exc|class)", r"\w*(Error|Exception|Interrupt|Stopped|Needed)"),
    # Napoleon reads the words before a colon in "Returns" as a type.
    (r"py:class", r".* .*"),
]

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):")
_ITEM = re.compile(r"\s*([-*]|\d+\.) ")
_AS_IT_IS = re.compile(r"(`[^`]*`|(?<!\w)\*\w+\*(?!\w))")  # code, and one *word* of emphasis
_LINKED: set[tuple[str, str]] = set()  # pages of viewcode, and names on them
_MARKUP = re.compile(r"([*|]|(?<=\w)_(?!\w))")


def docstring_to_rst(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Turn a docstring, which is plain text with `names`, into reStructuredText.

    An indented block outside a section is an equation or an example and becomes a literal block.
    Elsewhere `*`, `|` and a trailing `_` are themselves, not markup.
    """
    # Napoleon takes "words: more words" in a property's first line for a type and a description.
    found: list[str] = [""] if what in ("property", "attribute") else []
    prose: list[str] = []
    in_section = in_block = in_list = False

    def flush() -> None:
        parts = _AS_IT_IS.split("\n".join(prose))
        parts[::2] = [_MARKUP.sub(r"\\\1", part) for part in parts[::2]]
        found.extend("".join(parts).split("\n") if prose else [])
        prose.clear()

    for line in lines:
        is_indented = line.startswith(" ")
        if line.strip() and not is_indented:
            if in_block:
                found.append("")
            in_section, in_block = bool(_SECTION.fullmatch(line.strip())), False
            in_list = bool(_ITEM.match(line))
        elif is_indented and not (in_section or in_block or in_list):
            in_block = True
            flush()
            found.extend(["", "::", ""])
        (found if in_block else prose).append(line)
    flush()
    lines[:] = found


def tidy_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: Any
) -> tuple[str, Any] | None:
    """Functions as defaults by their names, without stable-baselines3's private argument."""
    if signature is None:
        return None
    signature = re.sub(r"<function (\w+)[^>]*>", r"\1", signature).replace("<factory>", "...")
    return re.sub(r", _init_setup_model: [^,)]*", "", signature), returns


def leave_out(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Not a named tuple's fields, of which nothing is known, nor functions that are defaults."""
    is_field = (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
    is_default = what == "class" and inspect.isfunction(obj) and "." not in obj.__qualname__
    return True if is_field or is_default else None


def title_table(app: Sphinx, docname: str, source: list[str]) -> None:
    """A study's table.md is generated without a title, and is reached by a link only."""
    if docname.startswith("results/") and docname.endswith("/table"):
        title = "" if source[0].startswith("# ") else f"# {Path(docname).parent}\n\n"
        source[0] = f"---\norphan: true\n---\n\n{title}{source[0]}"


def find_results(app: Sphinx, doctree: nodes.document) -> None:
    """The pages of results/ are read through the link docs/results, which MyST has resolved."""
    for node in doctree.findall(addnodes.pending_xref):
        target = Path(node.get("reftarget") or "")
        if target.is_absolute() and target.is_relative_to(ROOT / "results"):
            node["reftarget"] = target.relative_to(ROOT).as_posix()


def mark_cells(app: Sphinx, doctree: nodes.document) -> None:
    """Mark long keys, and the sentences of wide tables, for _static/tables.css."""
    for table in doctree.findall(nodes.tgroup):
        for row in table.findall(nodes.row):
            for i, cell in enumerate(row.children):
                text = cell.astext()
                if i == 0 and max(map(len, text.split()), default=0) > 14:
                    cell["classes"].append("key")
                if table["cols"] > 2 and len(text) > 50:
                    cell["classes"].append("prose")


def link_sources(app: Sphinx, doctree: nodes.document) -> None:
    """A link [`name`](.../module.py) leads to the name's lines in the page that viewcode makes."""
    if app.builder.format != "html":
        return
    for node in list(doctree.findall(addnodes.download_reference)):
        path = (Path(app.srcdir) / app.env.docname).parent / node["reftarget"]
        path = (Path(app.srcdir) / node["reftarget"].lstrip("/")) if not path.exists() else path
        if path.suffix != ".py":
            continue
        module = path.resolve().relative_to(ROOT).with_suffix("").as_posix()
        page, name = f"_modules/totalprop/{module}", node.astext()
        uri = app.builder.get_relative_uri(app.env.docname, page)
        link = nodes.reference("", "", *node.children, internal=True, refuri=f"{uri}#{name}")
        node.replace_self(link)
        _LINKED.add((page, name))


def mark_sources(app: Sphinx, exception: Exception | None) -> None:
    """Give names that are linked an anchor; viewcode gives one to what the API reference shows."""
    missing = []
    for page, name in sorted(_LINKED) if exception is None else ():
        path = Path(app.outdir) / f"{page}.html"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if f'id="{name}"' in text:
            continue
        # The class first, then the method after it.
        spans = (rf'<span class="(?:nc|nf|fm)">{part}</span>' for part in name.split("."))
        found = re.search("(?:.*?)".join(spans), text, re.DOTALL)
        if found is None:
            missing.append(f"{page}: {name}")
            continue
        start = text.rindex("<span", 0, found.end()) + len("<span")
        path.write_text(f'{text[:start]} id="{name}"{text[start:]}', encoding="utf-8")
    if missing:
        raise ExtensionError(f"linked but not found, is the module in docs/api? {missing}")


def setup(app: Sphinx) -> None:
    """Connect the functions above; napoleon reads docstrings at priority 500, so after us."""
    app.connect("source-read", title_table)
    app.connect("doctree-read", find_results)
    app.connect("doctree-read", mark_cells)
    app.connect("doctree-read", link_sources)
    app.connect("build-finished", mark_sources)
    app.connect("autodoc-process-docstring", docstring_to_rst, priority=400)
    app.connect("autodoc-process-signature", tidy_signature)
    app.connect("autodoc-skip-member", leave_out)

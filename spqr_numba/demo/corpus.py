"""Text that every CPython carries: the language manual and the standard library's docstrings.

Nothing is downloaded and nothing is imported: ``pydoc_data.topics`` holds the manual as strings,
and docstrings are read from the sources with ``ast``. Each source file becomes one page, laid out
as the manual lays out its own entries: a signature, and under it the indented description.

The topics named in HELD_OUT_TOPICS are for evaluation. Training text never repeats one of their
paragraphs, whichever topic or docstring it stands in.
"""

from __future__ import annotations

import ast
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

__all__ = ["HELD_OUT_TOPICS", "held_out_text", "training_documents", "training_text"]

HELD_OUT_TOPICS = (
    "binary",
    "calls",
    "dict",
    "global",
    "import",
    "objects",
    "raise",
    "return",
    "slicings",
    "specialattrs",
    "strings",
    "subscriptions",
    "unary",
)
"""About a tenth of the manual: topics whose text no other topic includes."""

SKIPPED_FOLDERS = {"dist-packages", "idlelib", "site-packages", "test", "tests"}

# A shorter paragraph ("For example:") may stand anywhere without giving anything away.
SHORTEST_TELLING_PARAGRAPH = 40

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def held_out_text() -> str:
    """Return the held-out topics of the manual, joined by blank lines, in order of name."""
    return "\n\n".join(topics[name].strip() for name in HELD_OUT_TOPICS if name in topics)


def training_text() -> str:
    """Return every training document, joined by blank lines."""
    return "\n\n".join(training_documents())


def training_documents() -> list[str]:
    """Return the manual's other topics, then one page for each source file with docstrings.

    The order is that of the names, so one interpreter always gives the same list. A paragraph
    of the held-out topics, or one that an earlier document has, is left out.
    """
    seen = {_normal(paragraph) for paragraph in held_out_text().split("\n\n")}
    manual = (topics[name] for name in sorted(topics) if name not in HELD_OUT_TOPICS)
    documents = (_drop_seen(text, seen) for text in [*manual, *_library_pages()])
    return [document for document in documents if document]


def _drop_seen(text: str, seen: set[str]) -> str:
    """Return text without its telling paragraphs in seen, and add to seen those it keeps."""
    kept = []
    for paragraph in text.split("\n\n"):
        normal = _normal(paragraph)
        if normal not in seen:
            kept.append(paragraph)
        if len(normal) >= SHORTEST_TELLING_PARAGRAPH:
            seen.add(normal)
    return "\n\n".join(kept).strip()


def _normal(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _library_pages() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED_FOLDERS.intersection(parts):
            yield _page(".".join(parts).removesuffix(".__init__"), path)


def _page(name: str, path: Path) -> str:
    """Return what the docstrings of one source file say, or "" where they say nothing."""
    try:
        with warnings.catch_warnings(action="ignore"):  # old escapes in old modules
            module = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # deliberately broken files, such as lib2to3's
        return ""
    entries = list(_entries(module, f"{name}."))
    about = ast.get_docstring(module)
    if about or entries:
        entries.insert(0, f"{name}\n{'*' * len(name)}\n\n{about or ''}".strip())
    return "\n\n".join(entries)


def _entries(parent: ast.AST, prefix: str) -> Iterator[str]:
    """Yield an entry for each documented class, function and method, in the source's order."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Definition):
            docstring = ast.get_docstring(node)
            if docstring:
                yield f"{_signature(node, prefix)}\n\n{textwrap.indent(docstring, '   ')}"
            yield from _entries(node, f"{prefix}{node.name}.")


def _signature(node: Definition, prefix: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {prefix}{node.name}({bases})"
    return f"{prefix}{node.name}({ast.unparse(node.args)})"

"""What `make docs` does to the pages: the README is the home page, the notebook a page, and links
to files outside docs/ become their names (the repository has them)."""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Adds the pages that are not files of docs/."""
    readme = moved((ROOT / "README.md").read_text(encoding="utf-8"), "", "docs")
    notebook = json.loads((ROOT / "docs/first_steps.ipynb").read_text(encoding="utf-8"))
    files.append(File.generated(config, "index.md", content=readme))
    files.append(File.generated(config, "first_steps.md", content=page_of(notebook)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites links of a page of docs/."""
    if page.file.src_uri == "index.md":
        return markdown
    return moved(markdown, posixpath.join("docs", posixpath.dirname(page.file.src_uri)), "docs")


def moved(markdown, folder, root):
    """Returns the text of a page in `folder` of the repository, with links that lead to pages of
    `root` as that root has them, and other links as their text alone."""

    def link(found):
        is_image, text, target, anchor = found.groups()
        if "://" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if path == "README.md":
            path = posixpath.join(root, "index.md")
        if path.startswith(root + "/") and (path.endswith("index.md") or (ROOT / path).is_file()):
            here = posixpath.relpath(folder, root) if folder else "."
            to = posixpath.relpath(posixpath.relpath(path, root), here)
            return f"{is_image}[{text}]({to}{anchor or ''})"
        return text

    return LINK.sub(link, markdown)


def page_of(notebook):
    """Returns a notebook as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"

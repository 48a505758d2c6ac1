"""What `make docs` does to the pages: the README is the home page, the notebook a page, and links
to files outside docs/ become their names (the repository has them)."""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
HOME = "docs/index.md"  # the README
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Adds the pages that are not files of docs/."""
    readme = moved((ROOT / "README.md").read_text(encoding="utf-8"), "")
    notebook = json.loads((ROOT / "docs/first_steps.ipynb").read_text(encoding="utf-8"))
    files.append(File.generated(config, "index.md", content=readme))
    files.append(File.generated(config, "first_steps.md", content=page_of(notebook)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites links of a page of docs/."""
    if page.file.src_uri == "index.md":
        return markdown
    return moved(markdown, posixpath.join("docs", posixpath.dirname(page.file.src_uri)))


def moved(markdown, folder):
    """Returns the text of a page in `folder` of the repository, with links into docs/ as the site
    has them, and other links as their text alone."""

    def link(found):
        is_image, text, target, anchor = found.groups()
        if "://" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if path == "README.md":
            path = HOME
        if path == HOME or (path.startswith("docs/") and (ROOT / path).is_file()):
            to = posixpath.relpath(path, folder or "docs")  # the README is moved into docs/
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

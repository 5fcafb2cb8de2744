"""What the site has besides docs/*.md: the repository's own pages, the notebook, the reference.

A hook of mkdocs. Links are written for the repository; here those to pages become links between
pages, those to other files stay as words, and a link to nothing ends the build.
"""

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
NOTEBOOK = "docs/first_hour.ipynb"
# Page of the site: file of the repository.
OWN_PAGES = {
    "index.md": "README.md",
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
    "first_hour.md": NOTEBOOK,
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and the pictures that lie elsewhere."""
    for page, source in OWN_PAGES.items():
        path = ROOT / source
        text = _notebook(path) if source == NOTEBOOK else path.read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "reference.md", content=_reference()))
    for picture in (ROOT / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, picture.name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of the repository become links of the site."""
    source = OWN_PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if part.startswith("```") else _LINK.sub(lambda m: _link(m, source), part)
        for part in parts
    )


def _link(match: re.Match[str], source: str) -> str:
    picture, words, target = match.groups()
    url = urlsplit(target)
    if url.scheme or not url.path:
        return match[0]
    place = os.path.normpath(os.path.join(os.path.dirname(source), url.path))
    if not (ROOT / place).exists():
        raise PluginError(f"{source}: a link to {target}, where there is nothing")
    anchor = f"#{url.fragment}" if url.fragment else ""
    page = {file: page for page, file in OWN_PAGES.items()}.get(place)
    if page is None and place.startswith("docs/"):
        page = place.removeprefix("docs/")
    if page is None and picture:
        page = os.path.basename(place)
    return f"{picture}[{words}]({page}{anchor})" if page else words


def _notebook(path: Path) -> str:
    """A notebook as markdown: its words, its code, and what came of it."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(text for cell in cells for text in _cell(cell)) + "\n"


def _cell(cell: dict[str, Any]) -> Iterator[str]:
    text = "".join(cell["source"])
    yield text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" in data:
            yield f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})"
        elif shown := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
            yield f"```text\n{shown}\n```"


def _reference() -> str:
    """All that the packages export, a section each."""
    lines = ["# Reference", "", "What the packages export. Shapes: B images of a rank, D feature"]
    lines += ["size, K groups, V views, W ranks.", ""]
    for module, names in public_names().items():
        lines += [f"## {module}", ""]
        for name in names:
            lines += [f"::: {module}.{name}", "    options: {heading_level: 3}", ""]
    return "\n".join(lines)


def public_names() -> dict[str, list[str]]:
    """Package: the names of its `__all__`."""
    found = {}
    for path in sorted((ROOT / "scale_smog").rglob("__init__.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                module = ".".join(path.parent.relative_to(ROOT).parts)
                found[module] = ast.literal_eval(node.value)
    return found

"""The site builds strictly, without a dead link, and documents every public name."""

import re
import subprocess
import sys
import zlib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def mkdocs() -> None:
    for name in ("mkdocs", "mkdocstrings"):
        pytest.importorskip(name)


@pytest.fixture(scope="module")
def pages(mkdocs: None) -> ModuleType:
    """The hook that adds pages to docs/."""
    sys.path.insert(0, str(ROOT / "docs"))
    return import_module("site_pages")


@pytest.fixture(scope="module")
def site(mkdocs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return out


def test_every_public_name_is_in_the_reference_and_has_a_docstring(site, pages):
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    listed = {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}
    for module, names in pages.public_names().items():
        assert {f"{module}.{name}" for name in names} <= listed
        for name in names:
            found = getattr(import_module(module), name)
            assert not callable(found) or found.__doc__, f"{module}.{name} has no docstring"


def test_all_pictures_and_pages_that_the_site_names_are_there(site):
    for page in site.glob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
            if "://" not in target and not target.startswith(("data:", "mailto:", "/")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_site_asks_no_other_host_for_anything(site):
    for page in site.glob("*.html"):
        loaded = re.findall(
            r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]+)', page.read_text()
        )
        assert not [url for url in loaded if "canonical" not in url], page.name


def test_the_readme_is_of_one_screen_and_says_what_it_is_for():
    words = (ROOT / "README.md").read_text().split()
    assert len(words) <= 700 and "Self-supervised" in words[:10]


def test_a_link_to_nothing_ends_the_build(pages):
    from mkdocs.exceptions import PluginError

    def linked(text: str, source: str) -> str:
        return pages._LINK.sub(lambda match: pages._link(match, source), text)

    assert linked("[a](../SECURITY.md#x)", "docs/a.md") == "[a](security.md#x)"
    assert linked("[a](docs/engines.md)", "README.md") == "[a](engines.md)"
    assert linked("[a](benchmarks/results)", "README.md") == "a"
    with pytest.raises(PluginError, match=r"README\.md: a link to docs/nothing\.md"):
        linked("[a](docs/nothing.md)", "README.md")

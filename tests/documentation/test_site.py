"""The site: built strictly, with every public name, and with nothing that is loaded from elsewhere."""

import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest

from documentation import picture
from documentation.griffe_options import fenced
from documentation.hooks import first_page
from documentation.reference import SECTIONS

pytestmark = pytest.mark.docs
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once by the command of `make docs`, with a proxy that nothing answers."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return folder


def test_each_public_name_is_documented(site):
    *_, packed = (site / "objects.inv").read_bytes().split(b"\n", 4)
    documented = {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}
    page = (site / "python.html").read_text()
    for section in SECTIONS:
        for name in section.shown:
            path = f"{section.module}.{name}"
            assert path in documented or f'id="{path}"' in page, path


def test_no_docstring_shows_a_stand_in_or_a_plain_doctest(site):
    text = (site / "python.html").read_text()
    assert "{options}" not in text
    assert "<p>&gt;&gt;&gt;" not in text
    assert "skip_shortcuts" in text
    assert "EnergyOptions." not in text
    assert "function &lt;lambda&gt;" not in text


def test_the_pages_load_nothing_from_elsewhere(site):
    loaded = [
        address
        for page in site.rglob("*.html")
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text())
        for address in re.findall(r"""(?:src|href|srcset)=["']?(https?:[^"' >]+)""", tag)
    ]
    assert loaded == []


def test_the_first_page_is_the_readme_with_a_picture_for_each_scheme(site):
    text = (site / "index.html").read_text()
    assert 'src="images/idea-light.svg#only-light"' in text
    assert 'src="images/idea-dark.svg#only-dark"' in text
    assert "docs/" not in first_page((ROOT / "README.md").read_text()).replace("make docs", "").replace("`docs/", "")


def test_the_picture_is_what_the_script_draws(tmp_path):
    picture.main(tmp_path)
    for name in picture.THEMES:
        drawn, kept = (
            ElementTree.parse(folder / f"idea-{name}.svg").getroot() for folder in (tmp_path, picture.FOLDER)
        )
        assert [drawn.get(key) for key in ("width", "viewBox")] == [kept.get(key) for key in ("width", "viewBox")]
        assert (picture.FOLDER / f"idea-{name}.svg").stat().st_size < 60_000


def test_only_paragraphs_that_are_doctests_are_fenced():
    assert fenced("Text.\n\n>>> 1 + 1\n2\n\nMore.") == "Text.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nMore."

"""What mkdocs calls while it builds docs/: pages that are made of the code, of README.md and of examples/README.md."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # mkdocs loads this file by its path

from documentation import commands, message_list, option_tables, reference  # noqa: E402

GENERATED = {
    "commands.md": commands.page,
    "messages.md": message_list.page,
    "options.md": option_tables.page,
    "python.md": reference.page,
}
"""The pages that are made of the code."""


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, README.md as the first page, and the page of the examples with the files it links to."""
    pages = {name: make() for name, make in GENERATED.items()}
    pages["index.md"] = first_page((ROOT / "README.md").read_text(encoding="utf-8"))
    pages["examples.md"] = examples_page((ROOT / "examples" / "README.md").read_text(encoding="utf-8"))
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    examples = ROOT / "examples"
    for file in [examples / "tutorial.ipynb", *sorted((examples / "results").glob("*.png"))]:
        name = file.relative_to(examples).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Put the table of the classes of errors where a page asks for it, and lead links to examples/ into the site."""
    return of_the_site(markdown).replace("<!-- classes of errors -->", message_list.classes())


def of_the_site(page: str) -> str:
    """A page of docs/ with its links to examples/ as they are seen from the site."""
    return page.replace("](../examples/README.md", "](examples.md").replace("](../examples/results/", "](results/")


def first_page(readme: str) -> str:
    """README.md with its links as they are seen from docs/, and its picture as the colours of the page need it."""
    text = re.sub(r"(\]\(|src=\"|srcset=\")(?:docs|examples)/", r"\1", readme).replace("](README.md", "](examples.md")
    return re.sub(r"<picture>.*?</picture>", _for_both_schemes, text, flags=re.DOTALL)


def _for_both_schemes(picture: re.Match[str]) -> str:
    """A <picture> that follows the system as two images that follow the switch of the page."""
    (dark,) = re.findall(r'srcset="(.*?)"', picture[0])
    ((light, alt),) = re.findall(r'src="(.*?)" alt="(.*?)"', picture[0])
    return f"![{alt}]({light}#only-light)\n![{alt}]({dark}#only-dark)"


def examples_page(readme: str) -> str:
    """examples/README.md as a page of docs/."""
    return readme.replace("](../docs/", "](")

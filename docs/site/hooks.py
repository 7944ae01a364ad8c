"""What is made while the site is built: pages of other files of the repository, pictures, tables.

A page asks for it by a comment on a line of its own, `<!-- bench: FILE -->`, `<!-- support -->`, `<!-- operations -->`,
`<!-- command: NAME -->` or `<!-- public: MODULE -->`, or by a code block `python picture` whose last line is a pattern.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from parts import bench_table, code_page, command_table, linked_from_docs, public_names, support_tables
from pictures import BLOCK, Picture

import heedful
from heedful.ops import catalogue
from heedful.report import operations

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Pages that are files of the repository's root.
COPIES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
EXAMPLES = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "examples").glob("*.c")])
EXAMPLE = re.compile(r"(?<!\[)`(examples/\w+\.(?:py|c))`")
BENCH = re.compile(r"^<!-- bench: (\S+) -->$", re.M)
COMMAND = re.compile(r"^<!-- command: ([\w-]+) -->$", re.M)
PUBLIC = re.compile(r"^<!-- public: ([\w.]+) -->$", re.M)
SUPPORT = re.compile(r"^<!-- support -->$", re.M)
OPERATIONS = re.compile(r"^<!-- operations -->$", re.M)
# What a browser loads, as told from links that it follows only when asked.
LOADED = r'script|img|iframe|link(?! rel="(?:canonical|prev|next)")'
OUTSIDE = re.compile(rf'<(?:{LOADED})\b[^>]*\b(?:src|href)="?(?:https?:)?//[^>]*>')


def on_config(config: MkDocsConfig) -> None:
    """A page of each example, behind the doors; pages that nav does not name join those of their folder."""
    assert config.nav is not None
    for section in config.nav:
        for pages in section.values():
            if isinstance(pages, list):
                pages += _forgotten(pages)
    config.nav.insert(2, {"Examples": [{path.name: _page_of(path)} for path in EXAMPLES]})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Pages and pictures that have no file in docs."""
    for source, page in COPIES.items():
        files.append(File.generated(config, page, content=linked_from_docs((ROOT / source).read_text())))
    for module in _undescribed():
        text = f"# heedful.{module}\n\n<!-- public: heedful.{module} -->\n"
        files.append(File.generated(config, f"reference/{module}.md", content=text))
    for path in EXAMPLES:
        files.append(File.generated(config, _page_of(path), content=code_page(path)))
    shown = [Picture(b["code"]) for file in files.documentation_pages() for b in BLOCK.finditer(file.content_string)]
    for picture in {picture.path: picture for picture in shown}.values():
        files.append(File.generated(config, picture.path, content=picture.png()))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with what its comments and blocks ask for."""
    up = "../" * page.file.src_uri.count("/")
    if BENCH.search(markdown) or SUPPORT.search(markdown) or re.search(r"<!-- \w+:begin -->", markdown):
        # Room for a wide table.
        page.meta["hide"] = ["toc"]
    markdown = BENCH.sub(lambda comment: bench_table(ROOT / comment[1]), markdown)
    markdown = COMMAND.sub(lambda comment: command_table(comment[1]), markdown)
    markdown = PUBLIC.sub(lambda comment: public_names(comment[1], markdown), markdown)
    markdown = OPERATIONS.sub(lambda _: operations.page(operations.as_data(catalogue().values())), markdown)
    markdown = SUPPORT.sub(lambda _: support_tables(up), markdown)
    markdown = BLOCK.sub(lambda block: Picture(block["code"]).markdown(up), markdown)
    if page.file.src_uri.startswith("examples/"):
        return markdown
    return EXAMPLE.sub(lambda name: f"[`{name[1]}`]({up}{_page_of(ROOT / name[1])})", markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> None:
    """Refuses a page that a browser would load anything for from elsewhere."""
    outside = OUTSIDE.search(output)
    if outside is not None:
        raise PluginError(f"{page.file.src_uri} loads from another host: {outside[0]}")


def _forgotten(pages: list[dict[str, str]]) -> list[str]:
    """Pages of the same folder that a section of nav does not name."""
    named = {path for page in pages for path in page.values()}
    folder = min(named).rpartition("/")[0]
    found = {f"{folder}/{path.name}" for path in (DOCS / folder).glob("*.md")} if folder else set()
    if folder == "reference":
        found |= {f"reference/{module}.md" for module in _undescribed()}
    return sorted(found - named)


def _undescribed() -> list[str]:
    """Subpackages without a page of the reference that is written by hand."""
    return [name for name in heedful._SUBPACKAGES if not (DOCS / f"reference/{name}.md").exists()]


def _page_of(example: Path) -> str:
    return f"examples/{example.stem}_{example.suffix[1:]}.md"

"""The pages hang together: citations, links and sizes."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROTOCOL = ROOT / "docs/protocol"
README = ROOT / "README.md"
MAX_README = 200
"""Lines."""
MAX_LINE = 180
"""Characters of a line of prose; rows of tables may be longer."""

CITATION = re.compile(r"\(([a-z-]+\s+\d[\d.]*(?:,\s+(?:[a-z-]+\s+)?\d[\d.]*)*)\)")
"""One or more sections in parentheses: `(streams 2.4)`, `(status 8.2, 8.3)`."""
SECTION = re.compile(r"(?m)^#{1,3} (\d+(?:\.\d+)*)[. ]")


def pages() -> list[Path]:
    """Every page that people read; what packages bring along is theirs."""
    folders = ("docs", "bench", "examples")
    found = [*ROOT.glob("*.md"), *(page for f in folders for page in (ROOT / f).rglob("*.md"))]
    return [page for page in found if "node_modules" not in page.parts]


def sections(page: Path) -> list[str]:
    return SECTION.findall(page.read_text())


def prose(page: Path) -> str:
    """The text without fenced code."""
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text())


def snippets(language: str, page: Path) -> list[str]:
    """The fenced code of a page in one language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", page.read_text())


def anchors(page: Path) -> set[str]:
    """Names that a link may have after `#`: headings, in the form that GitHub gives them."""
    headings = re.findall(r"(?m)^#+ (.+)$", prose(page))
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def cited_page(name: str) -> Path | None:
    """The page of that name, or the one whose name begins with that word."""
    if (PROTOCOL / f"{name}.md").exists():
        return PROTOCOL / f"{name}.md"
    (*_, page) = sorted(PROTOCOL.glob(f"{name}-*.md")) or [None]
    return page


def citations() -> list[tuple[str, str, str]]:
    """File, page and section of each citation in the code."""
    found = []
    for file in sorted((ROOT / "relay").rglob("*.py")):
        for citation in CITATION.findall(file.read_text()):
            name = ""
            for part in re.split(r",\s+", citation):
                *words, section = part.split()
                name = words[0] if words else name
                found.append((str(file.relative_to(ROOT)), name, section))
    return [each for each in found if cited_page(each[1]) or "." in each[2]]


def test_citations_lead_to_a_section() -> None:
    """`(streams 2.4)` in the code is section 2.4 of docs/protocol/streams.md."""
    assert len(citations()) > 50
    astray = [
        (file, name, section)
        for file, name, section in citations()
        if not (page := cited_page(name)) or section not in sections(page)
    ]
    assert astray == []


def test_sections_are_numbered_in_order() -> None:
    """Each page is a chapter with a number of its own."""
    chapters = set()
    for page in sorted(PROTOCOL.glob("[!R]*.md")):
        chapter, *numbers = sections(page)
        assert {number.split(".")[0] for number in numbers} <= {chapter}, page
        keys = [[int(part) for part in number.split(".")] for number in numbers]
        assert all(before < after for before, after in pairwise(keys)), page
        chapters.add(chapter)
    assert len(chapters) == len(list(PROTOCOL.glob("[!R]*.md")))


def test_sections_that_pages_name_exist() -> None:
    """`§2.5` is a section of one of the pages."""
    known = {section for page in PROTOCOL.glob("*.md") for section in sections(page)}
    named = {
        (page.name, section)
        for page in PROTOCOL.glob("*.md")
        for section in re.findall(r"§(\d+(?:\.\d+)+)", page.read_text())
    }
    assert {each for each in named if each[1] not in known} == set()


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    """To a file that exists, and to a heading that it has."""
    astray = []
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            astray.append(link)
    assert astray == []


def test_python_in_daemon_mode_is_configured_as_shown() -> None:
    """The snippet runs with LaunchDarkly's SDK, and opens no connection."""
    (program,) = snippets("python", ROOT / "docs/daemon-mode.md")
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["config"].use_ldd
    assert names["config"].feature_store is names["store"]


def test_yaml_is_yaml() -> None:
    """Snippets to paste into a configuration can be read."""
    found = [yaml.safe_load(each) for page in pages() for each in snippets("yaml", page)]
    assert {"scrape_configs"} in [set(each) for each in found]
    (probes,) = [each for each in found if "livenessProbe" in each]
    deployed = yaml.safe_load((ROOT / "examples/kubernetes/deployment.yaml").read_text())
    (container,) = deployed["spec"]["template"]["spec"]["containers"]
    for name, probe in probes.items():
        assert probe["httpGet"]["path"] == container[name]["httpGet"]["path"]


def test_modules_that_architecture_names_exist() -> None:
    """`streams/hub.py` is there, in the package or in the repository."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w/]+\.py)`", text))
    assert len(named) > 50
    assert [n for n in named if not (ROOT / "relay" / n).exists() and not (ROOT / n).exists()] == []


def test_readme_is_short() -> None:
    """Two hundred lines at most; the rest is in docs/."""
    assert len(README.read_text().splitlines()) <= MAX_README


@pytest.mark.parametrize(
    "page",
    [*ROOT.glob("[!C]*.md"), ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_lines_can_be_read(page: Path) -> None:
    """Prose keeps to a width; rows of tables, and what is generated, may be longer."""
    text = re.sub(r"(?s)<!-- \w+ table -->.*?<!-- end -->", "", page.read_text())
    lines = text.splitlines()
    assert [line for line in lines if len(line) > MAX_LINE and not line.startswith("|")] == []


def test_every_page_can_be_found() -> None:
    """README, or the index of the protocol, names each page of docs/."""
    index = README.read_text()
    assert [p.name for p in ROOT.glob("docs/*.md") if f"(docs/{p.name})" not in index] == []
    index = (PROTOCOL / "README.md").read_text()
    assert [p.name for p in PROTOCOL.glob("[!R]*.md") if f"({p.name})" not in index] == []

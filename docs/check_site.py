"""Check a built site: every internal link and anchor leads somewhere, and no page loads anything from the network.

Usage: python docs/check_site.py site
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("object", "data")}
LINKS_THAT_LOAD = {"stylesheet", "icon", "preload", "modulepreload", "preconnect"}
LOADED_BY_STYLE = re.compile(r"""(?:@import\s+|url\()\s*["']?((?:https?:)?//[^"')\s]+)""")


class Page(HTMLParser):
    """What a page links to, what it loads, and which anchors it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element refers to."""
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.loaded += [value for name, value in values.items() if (tag, name) in LOADED]
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and LINKS_THAT_LOAD & set(values.get("rel", "").split()):
            self.loaded.append(values["href"])


def check(site: Path) -> list[str]:
    """What is wrong with the site in this folder, one line each."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    found = [f"{path.name}: loads {url}" for path in site.rglob("*.css") for url in _foreign(path)]
    for path, page in pages.items():
        for url in [*page.links, *page.loaded]:
            parts = urlsplit(url)
            if parts.scheme == "data" or (parts.scheme and url in page.links and url not in page.loaded):
                continue
            if parts.scheme or parts.netloc:
                found.append(f"{path.relative_to(site.resolve())}: loads {url}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            known = pages.get(target)
            if not target.exists():
                found.append(f"{path.relative_to(site.resolve())}: {url} does not exist")
            elif parts.fragment and known and unquote(parts.fragment) not in known.anchors:
                found.append(f"{path.relative_to(site.resolve())}: {url} has no such anchor")
    return found


def _foreign(path: Path) -> list[str]:
    return LOADED_BY_STYLE.findall(path.read_text(encoding="utf-8"))


def main() -> None:
    """Print what is wrong; exit with 1 if anything is."""
    site = Path(sys.argv[1])
    found = check(site)
    print(
        "\n".join(found) or f"{len(list(site.rglob('*.html')))} pages: all links and anchors are there, nothing foreign"
    )
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()

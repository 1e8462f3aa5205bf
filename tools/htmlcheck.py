"""Checks of the finished pages: links lead somewhere, images have a text, nothing comes from the network."""
import os
import re
from html.parser import HTMLParser
from urllib.parse import unquote

REMOTE = re.compile(r"\s*(https?:)?//")
LOADING = {"src", "srcset", "poster", "data", "xlink:href"}  # attributes that make the browser load something


class Page(HTMLParser):
    """What a page holds: ids, links, files it loads, and complaints about its elements."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loaded, self.problems = set(), [], [], []
        self.feed(text)
        for url in re.findall(r"(?:url\(|@import)\s*['\"]?(https?:[^'\")\s]+)", text):
            self.problems.append(f"style loads from the network: {url}")

    def handle_starttag(self, tag, attrs):
        """Look at one element."""
        values = dict(attrs)
        if "id" in values:
            self.ids.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "img" and not (values.get("alt") or "").strip():
            self.problems.append(f"image without alternative text: {(values.get('src') or 'no source')[:80]}")
        loading = LOADING | ({"href"} if tag in ("link", "image", "use") else set())
        for name in loading & values.keys():
            value = values[name] or ""
            if REMOTE.match(value):
                self.problems.append(f"<{tag}> loads from the network: {value}")
            elif not re.match(r"data:|#", value):
                self.loaded.append(value)

    handle_startendtag = handle_starttag


def resolved(url, name):
    """Path of the file that the page at `url` calls `name`."""
    return os.path.normpath(os.path.join(os.path.dirname(url), name.partition("?")[0]))


def check(pages, exists):
    """All problems of `pages` (address -> HTML): pairs (address, message). `exists(path)` knows the other files."""
    parsed = {url: Page(text) for url, text in pages.items()}
    for url, page in parsed.items():
        for message in page.problems:
            yield url, message
        for name in page.loaded:
            if not exists(resolved(url, name)):
                yield url, f"a file to load is not there: {name[:80]}"
        for href in page.links:
            if re.match(r"[a-z]+:|//", href):
                continue
            name, _, fragment = unquote(href).partition("#")
            path = resolved(url, name) if name else url
            if path not in parsed and not exists(path):
                yield url, f"link to a file that is not there: {href}"
            elif fragment and path in parsed and fragment not in parsed[path].ids:
                yield url, f"link to a place that is not there: {href}"

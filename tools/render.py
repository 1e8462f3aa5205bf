#!/usr/bin/env python3
"""The embedded renderer: the book of _quarto.yml as HTML pages, made with pandoc alone (pypandoc_binary and pyyaml).

    render.py [--root DIR] [--out DIR] [--force]

The pages have the numbers that Quarto gives. What they could not show is an error: all problems are listed, exit 1.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import crossref
import htmlcheck
import yaml
from nbmarkdown import Converter
from pages import Pages

TOOLS = Path(__file__).resolve().parent
READ = "markdown+tex_math_single_backslash"
STATIC = ("site.css", "site.js")


def pandoc(arguments, text):
    """Run pandoc: (output, list of warnings)."""
    import pypandoc

    command = [pypandoc.get_pandoc_path(), *arguments]
    run = subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8", check=False)
    if run.returncode:
        raise RuntimeError(f"pandoc: {run.stderr}")
    return run.stdout, [line for line in re.split(r"\n(?=\[)", run.stderr.strip()) if line]


class Chapter:
    """One source file and its page."""

    def __init__(self, book, file):
        self.book, self.file = book, file
        self.url = str(Path(file).with_suffix(".html").as_posix())
        self.number = None
        self.files = {}  # images
        self.cited = set()

    def problem(self, message):
        """Note a problem of this chapter."""
        self.book.problems.append(f"{self.file}: {message}")

    def load(self):
        """Read the source: `blocks`, `title`, `label`."""
        path = self.book.root / self.file
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            converter = Converter(path.stem)
            text = converter.notebook(json.loads(text))
            self.files = converter.files
            for message in converter.problems:
                self.problem(message)
        text = re.sub(r"^\{\{<\s*include\s+(\S+)\s*>\}\}", lambda m: self.include(path, m[1]), text, flags=re.M)
        output, warnings = pandoc(["-f", READ, "-t", "json", "--columns=100000"], text)
        for warning in warnings:
            self.problem(warning)
        tree = json.loads(output)
        self.book.api = tree["pandoc-api-version"]
        self.take_title(tree["blocks"])

    def include(self, path, name):
        """Text of an included file."""
        other = path.parent / name
        if not other.is_file():
            self.problem(f"included file {name} is missing")
            return ""
        return other.read_text(encoding="utf-8")

    def take_title(self, blocks):
        """Split the first heading of level 1 from the rest."""
        first = next((i for i, block in enumerate(blocks) if block["t"] == "Header" and block["c"][0] == 1), None)
        if first is None:
            self.problem("no heading of level 1: a chapter starts with `# Title {#sec-name}`")
            self.title, self.label, self.numbered = [crossref.string(Path(self.file).stem)], "", False
        else:
            _, (self.label, classes, _), self.title = blocks.pop(first)["c"]
            self.numbered = "unnumbered" not in classes
        self.blocks = blocks

    def inlines(self, text):
        """Parse the text of an attribute as inline markdown."""
        if re.search(r"[$*_`@\\\[]", text):
            blocks = json.loads(pandoc(["-f", READ, "-t", "json"], text)[0])["blocks"]
            return blocks[0]["c"] if blocks else []
        return [crossref.string(text)]

    def number_it(self, number):
        """Give the chapter its number and number what is in it."""
        self.number = number if self.numbered else None
        numbering = crossref.Numbering(self, self.book.labels, self.problem)
        if self.label.startswith("sec-"):
            numbering.put(self.label, str(self.number or ""))
        self.blocks = numbering.run(self.blocks)

    def to_html(self, bibliography):
        """Pandoc's HTML of the title and the body: `heading`, `body`."""
        blocks = [{"t": "Plain", "c": self.title}, crossref.raw_block("<!--body-->"), *self.blocks]
        meta = {}
        has_references = any(b["t"] == "Div" and b["c"][0][0] == "refs" for b in self.blocks)
        arguments = ["-f", "json", "-t", "html5", "--mathml", "--wrap=none"]
        if bibliography and (self.cited or has_references):
            # every page cites all works of the book, so that names and letters (2022a) are the same everywhere
            meta["nocite"] = {"t": "MetaInlines", "c": [citation(key) for key in sorted(self.book.cited())]}
            arguments += ["--citeproc", "--metadata=link-citations:true", "--metadata=link-bibliography:true"]
            arguments += [f"--bibliography={self.book.root / name}" for name in bibliography]
            if not has_references:  # links are only made where there is a list; it is cut out below
                mark = crossref.raw_block("<!--list-->")
                blocks += [mark, {"t": "Div", "c": [["refs", [], []], []]}, mark]
        tree = {"pandoc-api-version": self.book.api, "meta": meta, "blocks": blocks}
        output, warnings = pandoc(arguments, json.dumps(tree))
        for warning in warnings:
            self.problem(warning)
        # browsers stretch a combining accent over its letter and at times lose it: set the spacing one as it is
        accent = re.compile("<mover>(<mi>[^<]*</mi>)<mo accent=\"true\">([\u0302\u0303])</mo>")
        spacing = {"\u0302": "\u02c6", "\u0303": "\u02dc"}
        output = accent.sub(
            lambda m: f'<mover accent="true">{m[1]}<mo accent="true" stretchy="false">{spacing[m[2]]}</mo>', output
        )
        self.heading, _, body = re.sub(r"<!--list-->.*<!--list-->", "", output, flags=re.S).partition("<!--body-->")
        if self.book.references and not has_references:
            page = os.path.relpath(self.book.references, Path(self.url).parent)
            body = re.sub(r'href="#ref-', f'href="{page}#ref-', body)
        lead = re.compile(r"\s*<blockquote>(.*?)</blockquote>", re.S)
        if lead.match(body):  # the subtitle
            body = lead.sub(r'<div class="lead">\1</div>', body, count=1)
        self.body = body

    def sections(self):
        """Parts of the chapter for the search: [id, heading, text]."""
        parts = [["", "", []]]
        for block in self.blocks:
            if block["t"] == "Header":
                parts.append([block["c"][1][0], crossref.plain_text(block["c"][2]), []])
            else:
                parts[-1][2].append(crossref.plain_text(block))
        return [[name, heading, " ".join(text)] for name, heading, text in parts]


def citation(key):
    """A citation of `key`, to make the bibliography list it."""
    fields = {"citationId": key, "citationPrefix": [], "citationSuffix": [], "citationNoteNum": 0, "citationHash": 0}
    return {"t": "Cite", "c": [[{**fields, "citationMode": {"t": "NormalCitation"}}], []]}


class Book:
    """The book that _quarto.yml describes."""

    def __init__(self, root):
        self.root = Path(root).resolve()
        self.config = yaml.safe_load((self.root / "_quarto.yml").read_text(encoding="utf-8"))
        self.settings = self.config["book"]
        self.problems, self.labels, self.api = [], {}, None
        self.items = []  # parts (strings) and chapters, in order
        self.collect(self.settings["chapters"])
        self.chapters = [item for item in self.items if isinstance(item, Chapter)]

    def collect(self, entries):
        """Note the chapters of a list in _quarto.yml."""
        for entry in entries:
            if isinstance(entry, dict):
                self.items.append(entry["part"])
                self.collect(entry.get("chapters", []))
            else:
                self.items.append(Chapter(self, entry))

    def exists(self, path):
        """Whether the project has such a file."""
        return not path.startswith("..") and (self.root / path).exists()

    def source_url(self, path):
        """Where the repository shows a file."""
        kind = "tree" if (self.root / path).is_dir() else "blob"
        return f"{self.settings['repo-url']}/{kind}/main/{path}"

    def cited(self):
        """Keys of all works that the book cites."""
        return set().union(*(chapter.cited for chapter in self.chapters))

    def build(self):
        """Everything up to the HTML of each chapter; False where files are missing."""
        missing = [chapter.file for chapter in self.chapters if not (self.root / chapter.file).is_file()]
        self.problems += [f"_quarto.yml lists {file}, which does not exist" for file in missing]
        listed = {chapter.file for chapter in self.chapters}
        present = (path.relative_to(self.root).as_posix() for path in sorted(self.root.glob("nbs/*.ipynb")))
        self.problems += [f"{file} is not listed in _quarto.yml" for file in present if file not in listed]
        if missing:
            return False
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(Chapter.load, self.chapters))
            number = 0
            for chapter in self.chapters:
                chapter.number_it(number + 1)
                number = chapter.number or number
            sources = {chapter.file: chapter for chapter in self.chapters}
            for chapter in self.chapters:
                chapter.blocks = crossref.resolve(chapter, self.labels, sources, chapter.problem)
            self.references = next((c.url for c in self.chapters if Path(c.file).stem == "references"), None)
            names = self.config.get("bibliography", [])
            bibliography = [names] if isinstance(names, str) else names
            list(pool.map(lambda chapter: chapter.to_html(bibliography), self.chapters))
        return True

    def write(self, out):
        """Write pages, images, notebooks, styles and the search index."""
        shutil.rmtree(out, ignore_errors=True)
        frame = Pages(self)
        pages = {chapter.url: frame.page(chapter) for chapter in self.chapters}
        files = {name: (TOOLS / name).read_bytes() for name in STATIC}
        files["search.js"] = ("window.SEARCH = " + json.dumps(self.index(), ensure_ascii=False)).encode()
        for path in (self.root / "nbs" / "assets").glob("*"):
            if path.suffix in (".css", ".woff2", ".txt", ".png", ".svg", ".jpg"):
                files[f"nbs/assets/{path.name}"] = path.read_bytes()
        for chapter in self.chapters:
            folder = Path(chapter.url).parent
            files |= {(folder / name).as_posix(): content for name, content in chapter.files.items()}
            if chapter.file.endswith(".ipynb"):
                files[chapter.file] = (self.root / chapter.file).read_bytes()
        for name, content in [*files.items(), *((url, text.encode()) for url, text in pages.items())]:
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        by_url = {chapter.url: chapter for chapter in self.chapters}
        for url, message in htmlcheck.check(pages, lambda path: (out / path).exists()):
            by_url[url].problem(message)

    def index(self):
        """The search index: chapter by chapter, section by section."""
        return [
            {"url": chapter.url, "title": crossref.plain_text(chapter.title), "parts": chapter.sections()}
            for chapter in self.chapters
        ]


def digest(root):
    """Digest of all that pages are made from."""
    patterns = ("_quarto.yml", "*.md", "*.qmd", "nbs/*", "nbs/assets/*")
    paths = [path for pattern in patterns for path in root.glob(pattern)] + list(TOOLS.glob("*"))
    state = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        state.update(path.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def main():
    """Render; list problems and exit 1 where there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=".", type=Path, help="folder of the project")
    parser.add_argument("--out", type=Path, help="folder to write to (default: output-dir of _quarto.yml)")
    parser.add_argument("--force", action="store_true", help="even when nothing changed")
    args = parser.parse_args()
    start = time.time()
    book = Book(args.root)
    out = args.out or book.root / book.config["project"].get("output-dir", "_book")
    stamp, state = out / ".digest", digest(book.root)
    if not args.force and stamp.is_file() and stamp.read_text() == state:
        print(f"{len(book.chapters)} pages in {out.name}: nothing changed")
        return
    print(f"rendering {len(book.chapters)} pages with the embedded renderer", flush=True)
    if book.build():
        book.write(out)
    for problem in book.problems:
        print(f"ERROR {problem}", file=sys.stderr)
    if book.problems:
        sys.exit(f"{len(book.problems)} problem(s)")
    stamp.write_text(state)
    print(f"{len(book.chapters)} pages in {time.time() - start:.1f} s")


if __name__ == "__main__":
    main()

"""The page around a chapter: navigation, contents, neighbours, links, from the template page.html."""
import html
import re
from pathlib import Path
from string import Template

import crossref

TEMPLATE = Path(__file__).resolve().with_name("page.html")


class Pages:
    """Puts a chapter's HTML into the page around it."""

    def __init__(self, book):
        self.book = book
        self.template = Template(TEMPLATE.read_text(encoding="utf-8"))
        script = book.root / "nbs" / "assets" / "tables.html"
        self.script = script.read_text(encoding="utf-8") if script.is_file() else ""

    @staticmethod
    def label(chapter):
        """Number and title."""
        number = f'<span class="secno">{chapter.number}</span> ' if chapter.number else ""
        return number + chapter.heading.strip()

    def navigation(self, here, up):
        """The list of parts and chapters."""
        out = []
        for item in self.book.items:
            if isinstance(item, str):
                out.append(f'<li class="part">{html.escape(item)}</li>')
            else:
                current = ' aria-current="page"' if item is here else ""
                out.append(f'<li><a href="{up}{item.url}"{current}>{self.label(item)}</a></li>')
        return "\n".join(out)

    @staticmethod
    def contents(chapter):
        """The list of sections, taken from the finished headings."""
        out = []
        for level, name, text in re.findall(r'<h([23])[^>]* id="([^"]+)"[^>]*>(.*?)</h\1>', chapter.body, flags=re.S):
            out.append(f'<li class="level{level}"><a href="#{name}">{re.sub(r"</?a[^>]*>", "", text)}</a></li>')
        return "\n".join(out)

    def neighbour(self, chapter, step, up):
        """Link to the page before or after."""
        index = self.book.chapters.index(chapter) + step
        if not 0 <= index < len(self.book.chapters):
            return "<span></span>"
        other = self.book.chapters[index]
        name, word = ("next", "Next") if step > 0 else ("prev", "Previous")
        return f'<a class="{name}" rel="{name}" href="{up}{other.url}"><small>{word}</small>{self.label(other)}</a>'

    def links(self, chapter):
        """Links to the source of the page."""
        out = [f'<a href="{self.book.source_url(chapter.file)}">View source</a>']
        if chapter.file.endswith(".ipynb"):
            out.insert(0, f'<a href="{Path(chapter.file).name}" download>Download notebook</a>')
        return "\n".join(out)

    def page(self, chapter):
        """The whole page."""
        up = "../" * chapter.url.count("/")
        return self.template.substitute(
            up=up,
            book=html.escape(self.book.settings["title"]),
            home=up + self.book.chapters[0].url,
            title=html.escape(crossref.plain_text(chapter.title)),
            navigation=self.navigation(chapter, up),
            contents=self.contents(chapter),
            links=self.links(chapter),
            label=chapter.label or "top",
            heading=self.label(chapter),
            body=chapter.body,
            prev=self.neighbour(chapter, -1, up),
            next=self.neighbour(chapter, 1, up),
            script=self.script,
        )

"""Numbers and references of the book, on Pandoc's syntax tree: the same numbers as Quarto gives.

First `Numbering` walks every chapter, numbers what has a label and notes it in `labels`; then `resolve` replaces the
references. What the book's pages could not show is a problem: unknown fenced divs, labels used twice, unresolved
references, lost formulas, stray markup.
"""
import os
import re
from pathlib import PurePosixPath

NAMES = {
    "eq": "Equation",
    "fig": "Figure",
    "tbl": "Table",
    "sec": "Section",
    "thm": "Theorem",
    "lem": "Lemma",
    "cor": "Corollary",
    "prp": "Proposition",
    "cnj": "Conjecture",
    "def": "Definition",
    "exm": "Example",
    "exr": "Exercise",
}
THEOREMS = NAMES.keys() - {"eq", "fig", "tbl", "sec"}
PROOFS = {"proof": "Proof", "remark": "Remark", "solution": "Solution"}
CALLOUTS = {f"callout-{kind}" for kind in ("note", "tip", "warning", "important", "caution")}
DIVS = CALLOUTS | PROOFS.keys() | {"searchable", "cell", "exported", "float"}
ATTRIBUTES = {"name", "title", "collapse", "module"}
HEADERS = {"unnumbered", "unlisted"}
LOST_MATH = re.compile(r"\\(boxed|fbox|cancel|bcancel|xcancel|color|textcolor|colorbox|tag|label)(?![a-zA-Z])")
SPANS = {f"state-{state}" for state in ("passed", "shown", "cited", "open")}      # of the ledger
STRAY = re.compile(r"^\{\{<|^:::|\$")


# ------------------------------------------------------------------------------------------------ the tree, in general


def walk(node, visit):
    """Rebuild the tree from the leaves up; `visit(element)` gives None (keep), an element, or a list to splice in."""
    if isinstance(node, dict):
        return {key: walk(value, visit) for key, value in node.items()}
    if not isinstance(node, list):
        return node
    out = []
    for item in node:
        item = walk(item, visit)
        new = visit(item) if isinstance(item, dict) and "t" in item else None
        out.extend(new if isinstance(new, list) else [item if new is None else new])
    return out


def plain_text(node):
    """The text of a part of the tree; formulas as bare as they come."""
    out = []

    def visit(element):
        kind, content = element["t"], element.get("c")
        if kind == "Str":
            out.append(content)
        elif kind in ("Code", "CodeBlock"):
            out.append(content[1] + " ")
        elif kind == "Math":
            out.append(re.sub(r"\\[,;!]|[\\{}$&]|(?<=\\)(left|right)", "", content[1]))
        elif kind in ("RawBlock", "RawInline"):
            out.append(re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", content[1], flags=re.S))
        elif kind in ("Space", "SoftBreak", "LineBreak", "Para", "Plain", "Header"):
            out.append(" ")

    walk([node], visit)
    return re.sub(r"\s+", " ", "".join(out)).strip()


def string(text):
    """A `Str` element."""
    return {"t": "Str", "c": text}


def raw_inline(text):
    """HTML within a line."""
    return {"t": "RawInline", "c": ["html", text]}


def raw_block(text):
    """HTML as a block."""
    return {"t": "RawBlock", "c": ["html", text]}


def strong(inlines):
    """Bold text."""
    return {"t": "Strong", "c": inlines}


def link(inlines, url):
    """A cross-reference."""
    return {"t": "Link", "c": [["", ["xref"], []], inlines, [url, ""]]}


# ------------------------------------------------------------------------------------------------------------- numbers


class Numbering:
    """Numbers what has a label in one chapter. `labels` (of the whole book) maps a label to (chapter, number)."""

    def __init__(self, chapter, labels, problem):
        self.chapter, self.labels, self.problem = chapter, labels, problem
        self.prefix = f"{chapter.number}." if chapter.number else ""
        self.counts = {}
        self.sections = [0] * 8

    def run(self, blocks):
        """The chapter's blocks with numbers; headings of boxes are no sections."""
        return walk(walk(blocks, self.mark_titles), self.visit)

    def put(self, label, number):
        """Note a label."""
        if label in self.labels:
            self.problem(f"label {label} is defined twice (also in {self.labels[label][0].file})")
        self.labels[label] = (self.chapter, number)

    def next(self, kind, label):
        """The next number of its kind, noted."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        number = f"{self.prefix}{self.counts[kind]}"
        self.put(label, number)
        return number

    def mark_titles(self, element):
        """A heading that opens a box is its title."""
        if element["t"] == "Div" and element["c"][1] and element["c"][1][0]["t"] == "Header":
            label, classes, _ = element["c"][0]
            if label.split("-")[0] in THEOREMS or CALLOUTS & set(classes):
                element["c"][1][0]["t"] = "BoxTitle"

    def visit(self, element):
        """Number one element."""
        method = getattr(self, "visit_" + element["t"].lower(), None)
        return method(element) if method else None

    def visit_para(self, element):
        """Paragraphs: labelled display formulas."""
        element["c"] = self.equations(element["c"])
        for item in element["c"]:
            if item["t"] == "Str" and "{#" in item["c"]:
                self.problem(f"label that belongs to nothing: {item['c']!r}")

    visit_plain = visit_para

    def equations(self, inlines):
        """Find `$$ … $$ {#eq-x}` among inlines."""
        out = []
        todo = list(inlines)
        while todo:
            item = todo.pop(0)
            out.append(item)
            if item["t"] != "Math" or item["c"][0]["t"] != "DisplayMath":
                continue
            rest = next((i for i, x in enumerate(todo) if x["t"] not in ("Space", "SoftBreak")), None)
            match = rest is not None and re.match(r"\{#(eq-[\w:.-]+)\}(.*)$", str(todo[rest].get("c")))
            if not match:
                continue
            label = match[1]
            number = self.next("eq", label)
            del todo[: rest + 1]
            start = f'<span class="eqn" id="{label}"><span class="scroll">'
            end = f'</span><a class="eqno" href="#{label}">({number})</a></span>'
            out[-1:] = [raw_inline(start), item, raw_inline(end)]
            out += [string(match[2])] if match[2] else []
        return out

    def visit_header(self, element):
        """Headings: section numbers, and anchors to link to."""
        level, (label, classes, _), inlines = element["c"]
        for name in set(classes) - HEADERS:
            self.problem(f"heading “{plain_text(inlines)}”: class .{name} is not supported")
        if level == 1:
            self.problem(f"heading “{plain_text(inlines)}”: a chapter has one heading of level 1")
        number = ""
        if self.prefix and "unnumbered" not in classes:
            self.sections[level] += 1
            self.sections[level + 1 :] = [0] * (7 - level)
            number = self.prefix + ".".join(map(str, self.sections[2 : level + 1]))
            inlines[:0] = [raw_inline(f'<span class="secno">{number}</span> ')]
        if label.startswith("sec-"):
            self.put(label, number)

    def visit_figure(self, element):
        """Figures written in markdown: the caption is the alternative text, unless there is a fig-alt."""
        label, caption = element["c"][0][0], element["c"][1][1]
        if label.startswith("fig-") and caption:
            caption[0]["c"][:0] = self.heading("fig", label)

    def visit_table(self, element):
        """Tables written in markdown: they scroll where they are wide; captions stand above."""
        element["c"] = walk(element["c"], self.scrolling)
        attributes, caption = element["c"][0], element["c"][1]
        head, body = [raw_block('<div class="table">')], [element, raw_block("</div>")]
        label = attributes[0]
        if not caption[1]:
            return head + body
        text = self.heading("tbl", label) if label.startswith("tbl-") else []
        text += caption[1][0]["c"]
        attributes[0], element["c"][1] = "", [None, []]
        return self.framed(label, "tbl", head + body, text)

    @staticmethod
    def scrolling(element):
        """Long formulas in a table scroll by themselves, since a formula can't be broken into lines."""
        if element["t"] == "Math" and len(element["c"][1]) > 90:
            return [raw_inline('<span class="scroll">'), element, raw_inline("</span>")]
        return None

    def heading(self, kind, label):
        """The words a caption begins with."""
        return [strong([string(f"{NAMES[kind]} {self.next(kind, label)}")]), string(": ")]

    @staticmethod
    def framed(label, kind, body, caption):
        """A figure or table with its caption, below or above."""
        text = [raw_block("<figcaption>"), {"t": "Plain", "c": caption}, raw_block("</figcaption>")]
        parts = text + body if kind == "tbl" else body + text
        anchor = f' id="{label}"' if label else ""
        return [raw_block(f'<figure{anchor} class="{kind}">'), *parts, raw_block("</figure>")]

    def visit_div(self, element):
        """Boxes: callouts, theorems, proofs, floats. Anything else is a problem."""
        (label, classes, attributes), blocks = element["c"]
        kind = label.split("-")[0]
        for name in set(classes) - DIVS:
            self.problem(f"fenced div of class .{name} is not supported")
        for name in {key for key, _ in attributes} - ATTRIBUTES:
            self.problem(f"fenced div with {name}= is not supported")
        if CALLOUTS & set(classes):
            return self.callout(element)
        if kind in THEOREMS and "-" in label:
            return self.theorem(element, kind)
        if PROOFS.keys() & set(classes):
            return self.proof(element)
        if kind in ("fig", "tbl") and "-" in label:
            return self.float(element, kind)
        if not classes and label != "refs":
            self.problem(f"fenced div {{#{label}}} is not supported" if label else "fenced div without a class")
        return None

    def title(self, element, key):
        """The title of a box: a first heading or an attribute."""
        (_, _, attributes), blocks = element["c"]
        if blocks and blocks[0]["t"] == "BoxTitle":
            return blocks.pop(0)["c"][2]
        text = dict(attributes).get(key)
        return self.chapter.inlines(text) if text else []

    def theorem(self, element, kind):
        """A numbered statement."""
        (label, classes, _), blocks = element["c"]
        title = self.title(element, "name")
        head = [strong([string(f"{NAMES[kind]} {self.next(kind, label)}")])]
        head += [string(" ("), strong(title), string(")")] if title else []
        if not (blocks and blocks[0]["t"] == "Para"):
            blocks.insert(0, {"t": "Para", "c": []})
        blocks[0]["c"][:0] = [*head, string(" ")]
        classes += ["theorem", NAMES[kind].lower()]

    def proof(self, element):
        """A proof, remark or solution."""
        (_, classes, _), blocks = element["c"]
        name = PROOFS[next(iter(PROOFS.keys() & set(classes)))]
        title = self.title(element, "name")
        suffix = [string(" ("), *title, string(")")] if title else []
        head = [{"t": "Emph", "c": [string(name), *suffix, string(".")]}]
        if not (blocks and blocks[0]["t"] == "Para"):
            blocks.insert(0, {"t": "Para", "c": []})
        blocks[0]["c"][:0] = [*head, string(" ")]
        if name == "Proof":
            end = raw_inline('<span class="qed" aria-label="end of proof">∎</span>')
            if blocks[-1]["t"] == "Para":
                blocks[-1]["c"].append(end)
            else:
                blocks.append({"t": "Plain", "c": [end]})

    def callout(self, element):
        """A box with a title, folded where it says so."""
        (label, classes, attributes), blocks = element["c"]
        kind = next(iter(CALLOUTS & set(classes))).removeprefix("callout-")
        title = self.title(element, "title") or [string(kind.title())]
        collapse = dict(attributes).get("collapse")
        outer, inner = ("details", "summary") if collapse else ("div", "div")
        opened = " open" if collapse == "false" else ""
        anchor = f' id="{label}"' if label else ""
        start = f'<{outer} class="callout {kind}"{anchor}{opened}><{inner} class="callout-title">'
        head = [raw_block(start), {"t": "Plain", "c": title}, raw_block(f'</{inner}><div class="callout-body">')]
        return [*head, *blocks, raw_block(f"</div></{outer}>")]

    def float(self, element, kind):
        """Outputs of a cell with a caption: the last paragraph of the div."""
        (label, _, _), blocks = element["c"]
        caption = blocks.pop()["c"] if blocks and blocks[-1]["t"] == "Para" else []
        return self.framed(label, kind, blocks, self.heading(kind, label) + caption)

    def visit_math(self, element):
        """Formulas that would lose something on the way to MathML."""
        lost = LOST_MATH.search(element["c"][1])
        if lost:
            self.problem(f"formula with {lost[0]}, which pages cannot show: {element['c'][1].strip()[:80]}")

    def visit_str(self, element):
        """Markup that was not understood and would be printed as it is."""
        if STRAY.search(element["c"]):
            self.problem(f"markup that is not understood: {element['c']!r}")

    def visit_rawblock(self, element):
        """Raw parts in other formats are lost."""
        if element["c"][0] != "html":
            self.problem(f"raw {element['c'][0]} is lost: {element['c'][1][:60]!r}")

    visit_rawinline = visit_rawblock

    def visit_span(self, element):
        """Spans with attributes."""
        for name in set(element["c"][0][1]) - SPANS:
            self.problem(f"span of class .{name} is not supported")

    def visit_codeblock(self, element):
        """Code blocks that Quarto would run or draw."""
        for name in element["c"][0][1]:
            if name.startswith("{") or name in ("mermaid", "dot"):
                self.problem(f"code block {name} is not supported")


# ---------------------------------------------------------------------------------------------------------- references


def resolve(chapter, labels, sources, problem):
    """Replace `@eq-x` and the like by links, and links to notebooks by links to pages. `sources`: file -> chapter."""
    here = PurePosixPath(chapter.url).parent

    def target(url):
        return os.path.relpath(url, here)

    def reference(citation):
        label, mode, prefix = citation["citationId"], citation["citationMode"]["t"], citation["citationPrefix"]
        if label not in labels:
            problem(f"unresolved reference @{label}")
            return strong([string("?@" + label)])
        other, number = labels[label]
        kind = label.split("-")[0]
        name = "Chapter" if kind == "sec" and "." not in number else NAMES[kind]
        if not number:
            shown = [string("“"), *other.title, string("”")]
        elif mode == "SuppressAuthor":
            shown = [string(number)]
        elif prefix:
            shown = [*prefix, string(f"\u00a0{number}")]
        else:
            shown = [string(f"{name}\u00a0{number}")]
        return link(shown, ("" if other is chapter else target(other.url)) + "#" + label)

    def visit_cite(element):
        citations, text = element["c"]
        ours = [c for c in citations if c["citationId"].split("-")[0] in NAMES and "-" in c["citationId"]]
        if not ours:
            chapter.cited.update(c["citationId"] for c in citations)
            return None
        out = []
        for citation in ours:
            out += ([string(", ")] if out else []) + [reference(citation)]
        if len(ours) < len(citations):
            problem(f"references and citations in one bracket: {plain_text(text)}")
        return out

    def visit_link(element):
        url, fragment = re.match(r"([^#]*)(#.*)?$", element["c"][2][0]).groups(default="")
        if not url or re.match(r"[a-z]+:", url):
            return
        path = os.path.normpath(PurePosixPath(chapter.file).parent / url)
        if path in sources:
            element["c"][2][0] = target(sources[path].url) + fragment
        elif chapter.book.exists(path):
            element["c"][2][0] = chapter.book.source_url(path)

    def visit(element):
        if element["t"] == "Cite":
            return visit_cite(element)
        return visit_link(element) if element["t"] == "Link" else None

    return walk(chapter.blocks, visit)

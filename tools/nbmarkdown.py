"""A notebook as Pandoc markdown: cells become fenced divs, stored outputs become text, images or raw HTML."""
import base64
import html
import re

import yaml

from nbfilter import filter_notebook, parse, source

PREFERRED = (
    "text/markdown",
    "text/html",
    "image/svg+xml",
    "image/png",
    "image/jpeg",
    "text/latex",
    "text/plain",
)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
KNOWN_OPTIONS = {"label", "fig-cap", "fig-alt", "tbl-cap", "echo", "output", "include", "eval"}
KNOWN_OPTIONS |= {"code-fold", "code-summary", "classes", "module"}


def fence(text, attributes, char="`"):
    """`text` between fences longer than any in it."""
    longest = max((len(run) for run in re.findall(re.escape(char) + "+", text)), default=0)
    marks = char * max(3, longest + 1)
    return f"\n{marks} {attributes}\n{text.rstrip()}\n{marks}\n"


def raw(text):
    """`text` as raw HTML."""
    return fence(text, "{=html}")


class Converter:
    """Turns one notebook into markdown; collects image files and problems."""

    def __init__(self, stem):
        self.stem = stem  # images are written to the folder STEM_files beside the page
        self.files = {}
        self.problems = []

    def notebook(self, notebook):
        """The whole notebook."""
        return "\n\n".join(self.cell(cell) for cell in filter_notebook(notebook)["cells"])

    def cell(self, cell):
        """One cell, markdown, raw or code."""
        text = source(cell)
        if cell["cell_type"] == "markdown":
            return text
        if cell["cell_type"] == "raw":
            self.problems.append(f"cell {cell['id']}: raw cells are not supported")
            return ""
        _, options, body = parse(text)
        options = self.options(cell, options)
        if options.get("include") is False:
            return ""
        parts = []
        if options.get("echo", True) is not False:
            parts.append(self.code(body, options))
        if options.get("output", True) is not False:
            parts.append(self.outputs(cell, options))
        exported = f' .exported module="{options["module"]}"' if "module" in options else ""
        return fence("\n".join(parts), f"{{#cell-{cell['id']} .cell{exported}}}", ":")

    def options(self, cell, options):
        """The cell's options as values; unknown ones are a problem."""
        text = "\n".join(f"{key}: {value}" for key, value in options.items())
        try:
            values = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            self.problems.append(f"cell {cell['id']}: option that is not YAML: {error}")
            values = {}
        for key in values.keys() - KNOWN_OPTIONS:
            self.problems.append(f"cell {cell['id']}: option {key!r} is not supported")
        return values

    def code(self, body, options):
        """The cell's code, folded where it says so."""
        block = fence(body.strip("\n"), "{.python .cell-code}")
        fold = options.get("code-fold", False)
        if fold is False:
            return block
        summary = html.escape(str(options.get("code-summary", "Code")))
        opened = " open" if fold == "show" else ""
        return raw(f'<details class="fold"{opened}><summary>{summary}</summary>') + block + raw("</details>")

    def outputs(self, cell, options):
        """All outputs of the cell, as a numbered figure or table where it has such a label."""
        parts = [self.output(cell, number, output, options) for number, output in enumerate(cell["outputs"])]
        body = "\n".join(part for part in parts if part)
        label = options.get("label", "")
        kind = label[:3]
        if not re.match(r"(fig|tbl)-", label):
            return body
        if not body:
            self.problems.append(f"cell {cell['id']}: {label} has no output (run `make book`)")
        if f"{kind}-cap" not in options:
            self.problems.append(f"cell {cell['id']}: {label} has no {kind}-cap")
        if kind == "fig" and not options.get("fig-alt"):
            self.problems.append(f"cell {cell['id']}: {label} has no fig-alt (alternative text)")
        return fence(f"{body}\n\n{options.get(f'{kind}-cap', '')}", f"{{#{label} .float}}", ":")

    def output(self, cell, number, output, options):
        """One output."""
        kind = output["output_type"]
        if kind == "error":
            self.problems.append(f"cell {cell['id']}: its stored output is an error")
            return ""
        if kind == "stream":
            text = COLOUR.sub("", source(output["text"]))
            return text if options.get("output") == "asis" else fence(text, "{.output}")
        data = output["data"]
        mime = next((mime for mime in PREFERRED if mime in data), None)
        text = source(data.get(mime))
        if mime == "text/markdown":
            return "\n" + text + "\n"
        if mime == "text/latex":
            return re.sub(r"^\$\\displaystyle (.*)\$$", r"\n$$\1$$\n", text.strip(), flags=re.S)
        if mime == "text/html":
            return raw(text)
        if mime and mime.startswith("image/"):
            return self.image(cell, number, mime, text, options)
        return fence(COLOUR.sub("", text), "{.output}") if mime else ""

    def image(self, cell, number, mime, text, options):
        """An image output, written to a file of its own."""
        alt = options.get("fig-alt")
        if not alt:
            self.problems.append(f"cell {cell['id']}: image without fig-alt (alternative text)")
        suffix = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}[mime]
        name = f"{self.stem}_files/{cell['id']}-{number}.{suffix}"
        self.files[name] = text.encode() if suffix == "svg" else base64.b64decode(text)
        return raw(f'<img src="{name}" alt="{html.escape(str(alt or ""))}" loading="lazy">')

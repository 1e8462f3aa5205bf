#!/usr/bin/env python3
"""Make a notebook fit for rendering: act on nbdev's directives and take them out.

Quarto runs this file as an ipynb-filter (a notebook in on stdin, a notebook out on stdout), and the embedded renderer
and the runner import it. Standard library only, since Quarto runs it with whatever python3 is on the PATH.
"""
import html
import json
import re
import sys

HIDING = {"hide", "default_exp"}  # cells with one of these vanish; exported code stays, it is the book
EXPORTING = {"export", "exports", "exporti"}
PRIVATE = {"depends"}  # options that only our own tools understand
DIRECTIVE = re.compile(r"\s*#\|(.*)$")
OPTION = re.compile(r"\s*([\w-]+)\s*:(?:\s+(.*))?$")


def source(cell):
    """The text of a cell or of an output field: notebooks store it as a string or as a list of lines."""
    text = cell["source"] if isinstance(cell, dict) else cell
    return "".join(text or "")


def parse(text):
    """Split a code cell into (flags, options, body).

    `flags` maps each nbdev directive (`#| export`, `#| default_exp hot`) to its argument, `options` each Quarto option
    (`#| key: value`, continued on lines that are indented) to its raw text; `body` is the rest of the cell.
    """
    flags, options, key = {}, {}, None
    lines = text.splitlines(keepends=True)
    count = 0
    for line in lines:
        directive = DIRECTIVE.match(line)
        if line.strip() and not directive:
            break
        count += 1
        if not directive or not directive[1].strip():
            continue
        content = directive[1].rstrip()
        option = OPTION.match(content)
        if key and re.match(r"\s{2,}", content):
            options[key] += "\n" + content
        elif option:
            key = option[1]
            options[key] = option[2] or ""
        else:
            key = None
            name, _, argument = content.strip().partition(" ")
            flags[name.rstrip(":")] = argument.strip()
    body = "".join(line for line in lines[count:] if "#| hide_line" not in line)
    return flags, options, body


def filter_output(output, alt):
    """HTML as raw HTML in markdown, animations of matplotlib without fonts from elsewhere and with an alternative text.

    For any plain HTML output, however small, Quarto would load jquery and requirejs from a content network.
    """
    text = source(output.get("data", {}).get("text/html")).strip()
    if not text:
        return output
    if "<script" in text:
        text = re.sub(r'<link rel="stylesheet"\s+href="https?://[^>]*>', "", text).strip()
        text = text.replace('language="javascript"', 'type="text/javascript"')
        text = text.replace('<img id="_anim', f'<img alt="{html.escape(alt)}" id="_anim')
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return dict(output, data={"text/markdown": [fence + "{=html}\n", text, f"\n{fence}\n"]})


def filter_cell(cell, module):
    """The code cell as the page shows it, or None where it shows nothing."""
    flags, options, body = parse(source(cell))
    if HIDING & flags.keys() or not body.strip():
        return None
    options = {key: value for key, value in options.items() if key not in PRIVATE}
    if EXPORTING & flags.keys():
        options["classes"] = "exported"
        options["module"] = "udm_book." + module
    head = ["#| " + f"{key}: {value}".replace("\n", "\n#|") + "\n" for key, value in options.items()]
    alt = options.get("fig-alt", "").strip("\"' ")
    return dict(cell, source=head + [body], outputs=[filter_output(o, alt) for o in cell.get("outputs", [])])


def filter_notebook(notebook):
    """The notebook with every code cell filtered and hidden ones dropped."""
    module = ""
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            module = parse(source(cell))[0].get("default_exp", module)
            cell = filter_cell(cell, module)
        if cell is not None:
            cells.append(cell)
    return dict(notebook, cells=cells)


def main():
    """What Quarto runs. It makes a cell's id the element's, and one such as `tbl-x` would be taken for a label."""
    notebook = filter_notebook(json.load(sys.stdin))
    for cell in notebook["cells"]:
        if "id" in cell:
            cell["id"] = "cell-" + cell["id"]  # as the embedded renderer names it
    json.dump(notebook, sys.stdout)


if __name__ == "__main__":
    main()

"""The tools: the renderer refuses what pages can't show, keys notice what matters, the runner planted errors."""
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import nbfilter  # noqa: E402
import notebooks  # noqa: E402

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def output(**data):
    """A display output; `png="…"`, `markdown="…"`, `html="…"`."""
    mime = {"png": "image/png", "markdown": "text/markdown", "html": "text/html"}
    return {"output_type": "display_data", "metadata": {}, "data": {mime[key]: value for key, value in data.items()}}


def cell(name, text, *outputs):
    """A code cell called `name`, or a markdown cell when `name` is None."""
    if name is None:
        return {"cell_type": "markdown", "id": f"md-{zlib.crc32(text.encode()):x}", "metadata": {}, "source": [text]}
    fields = {"execution_count": None, "outputs": list(outputs), "metadata": {}}
    return {"cell_type": "code", "id": name, "source": text.splitlines(keepends=True), **fields}


def save(path, *cells):
    """Write a notebook of these cells."""
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    notebook = {"cells": list(cells), "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook, sort_keys=True, indent=1) + "\n", encoding="utf-8")


def edit(path, old, new):
    """Replace text in a file; it must be there."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- renderer

BAD = {
    "unknown class of a fenced div": (cell(None, "::: {.column-margin}\nx\n:::"), ".column-margin is not supported"),
    "tab sets": (cell(None, "::: {.panel-tabset}\nx\n:::"), ".panel-tabset is not supported"),
    "layouts": (cell(None, '::: {#fig-two layout-ncol="2"}\nx\n\ncap\n:::'), "layout-ncol= is not supported"),
    "unresolved reference": (cell(None, "See @eq-nowhere."), "unresolved reference @eq-nowhere"),
    "unresolved citation": (cell(None, "See @nobody1999."), "nobody1999 not found"),
    "label used twice": (cell(None, "$$a$$ {#eq-good}"), "label eq-good is defined twice"),
    "silently lost math": (cell(None, r"$\boxed{a}$"), r"\boxed"),
    "lost number": (cell(None, r"$$\begin{aligned}a \tag{1}\end{aligned}$$"), r"\tag"),
    "math that can't be converted": (cell(None, r"$\vcenter{a}$"), "Could not convert TeX math"),
    "math that is none": (cell(None, "cost $ x$ here"), "not understood: '$'"),
    "shortcode": (cell(None, "{{< video x.mp4 >}}"), "not understood: '{{<'"),
    "image without text": (cell(None, "![](x.png)"), "image without alternative text"),
    "output image without text": (cell("fig", "plot()", output(png=PNG)), "image without fig-alt"),
    "figure without text": (
        cell("fig", "#| label: fig-x\n#| fig-cap: c\nplot()", output(png=PNG)),
        "fig-x has no fig-alt",
    ),
    "animation without text": (
        cell("ani", "play()", output(html='<script></script><img id="_anim_img1">')),
        "image without alternative text",
    ),
    "unknown cell option": (cell("opt", "#| layout-ncol: 2\n1"), "option 'layout-ncol' is not supported"),
    "link to a missing file": (cell(None, "[x](missing.html)"), "link to a file that is not there: missing.html"),
    "link to a missing place": (cell(None, "[x](01_good.ipynb#gone)"), "link to a place that is not there"),
    "missing image": (cell(None, "![An x](x.png)"), "a file to load is not there: x.png"),
    "image from the network": (cell(None, "![x](https://example.org/x.png)"), "loads from the network"),
    "script from the network": (
        cell("ext", "1", output(html='<script src="//example.org/x.js"></script>')),
        "loads from the network",
    ),
    "raw TeX": (cell(None, "\\begin{center}x\\end{center}"), "raw tex is lost"),
    "stored error": (
        cell("err", "1/0", {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}),
        "its stored output is an error",
    ),
    "second title": (cell(None, "# Another"), "one heading of level 1"),
}

GOOD = [
    cell(None, "# Good {#sec-good}\n\n> A subtitle.\n\nSee @sec-next, [@ho2020ddpm] and @eq-udm-10."),
    cell("exp", "#| default_exp good"),
    cell("code", "#| export\ndef doubled(x): return 2 * x"),
    cell(None, "## Part {#sec-part}\n\n$$a = b$$ {#eq-good}\n\n::: {#thm-one name=\"With $x$\"}\nTrue.\n:::"),
    cell(None, "::: {.proof}\nBy @eq-good.\n:::\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n: Numbers {#tbl-n}"),
    cell("plot", "#| label: fig-p\n#| fig-cap: A dot.\n#| fig-alt: A dot\nplot()", output(png=PNG)),
    cell(None, "::: {.searchable}\n| id |\n|---|\n| needle |\n:::\n\n@thm-one, @fig-p, @tbl-n, @sec-part"),
]
NEXT = [
    cell(None, "# Next {#sec-next}\n\n## First\n\n$$c$$ {#eq-c}"),
    cell("eq", 'ledger.equation("udm.10")', output(markdown="$$ x = y $$ {#eq-udm-10}")),
    cell(None, "[-@eq-udm-10], [Equation @eq-good], [the first](01_good.ipynb)"),
]


def book(root, chapters):
    """A small book in folder `root`: {stem: cells}."""
    (root / "nbs" / "assets").mkdir(parents=True)
    for stem, cells in chapters.items():
        save(root / "nbs" / f"{stem}.ipynb", *cells)
    for name in ("book.css", "tables.html", "stix-two-math.woff2"):
        shutil.copy(TOOLS.parent / "nbs" / "assets" / name, root / "nbs" / "assets")
    (root / "README.md").write_text("Hello, see [a chapter](nbs/01_good.ipynb).\n")
    (root / "index.qmd").write_text("# Home {.unnumbered}\n\n{{< include README.md >}}\n")
    (root / "nbs" / "references.qmd").write_text("# References {.unnumbered}\n\n::: {#refs}\n:::\n")
    entry = "@article{ho2020ddpm, title={Denoising}, author={Ho, Jonathan}, journal={J}, year={2020}}\n"
    (root / "nbs" / "references.bib").write_text(entry)
    files = ["index.qmd", *(f"nbs/{stem}.ipynb" for stem in chapters), "nbs/references.qmd"]
    config = {
        "project": {"type": "book", "output-dir": "_docs"},
        "book": {"title": "Test", "repo-url": "https://github.com/example/x", "chapters": files},
        "bibliography": "nbs/references.bib",
    }
    (root / "_quarto.yml").write_text(json.dumps(config))  # JSON is YAML


def render(root):
    """Run the renderer: (exit code, stderr)."""
    command = [sys.executable, TOOLS / "render.py", "--root", root]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.returncode, run.stdout + run.stderr


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A book without faults, rendered."""
    root = tmp_path_factory.mktemp("good")
    book(root, {"01_good": GOOD, "02_next": NEXT})
    code, text = render(root)
    assert code == 0, text
    return root


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """What the renderer says of a book with every fault, one a chapter."""
    root = tmp_path_factory.mktemp("bad")
    bad = {f"{number}_bad": [cell(None, "# Bad"), one] for number, (one, _) in enumerate(BAD.values(), 10)}
    book(root, {"01_good": GOOD, "02_next": NEXT, **bad})
    code, text = render(root)
    assert code == 1
    return text


@pytest.mark.parametrize("fault", BAD)
def test_renderer_refuses(fault, complaints):
    number = 10 + list(BAD).index(fault)
    ours = [line for line in complaints.splitlines() if line.startswith(f"ERROR nbs/{number}_bad.ipynb")]
    assert any(BAD[fault][1] in line for line in ours), ours


def test_renderer_names_missing_and_unlisted_files(tmp_path):
    book(tmp_path, {"01_good": GOOD})
    (tmp_path / "nbs" / "01_good.ipynb").rename(tmp_path / "nbs" / "02_other.ipynb")
    code, text = render(tmp_path)
    assert code == 1
    assert "_quarto.yml lists nbs/01_good.ipynb, which does not exist" in text
    assert "nbs/02_other.ipynb is not listed in _quarto.yml" in text


def links(page):
    """Cross-references of a page: {address: text}."""
    found = re.findall(r'<a href="([^"]*)" class="xref"[^>]*>(.*?)</a>', page, flags=re.S)
    return {href: re.sub(r"<[^>]*>", "", text).replace("\u00a0", " ") for href, text in found}


def test_numbers_of_cross_references(good):
    page = (good / "_docs" / "nbs" / "01_good.html").read_text(encoding="utf-8")
    assert links(page) == {
        "02_next.html#sec-next": "Chapter 2",
        "02_next.html#eq-udm-10": "Equation 2.2",
        "#eq-good": "Equation 1.1",
        "#thm-one": "Theorem 1.1",
        "#fig-p": "Figure 1.1",
        "#tbl-n": "Table 1.1",
        "#sec-part": "Section 1.1",
    }
    other = (good / "_docs" / "nbs" / "02_next.html").read_text(encoding="utf-8")
    assert links(other) == {"#eq-udm-10": "2.2", "01_good.html#eq-good": "Equation 1.1"}
    assert 'href="references.html#ref-ho2020ddpm"' in page
    assert 'id="ref-ho2020ddpm"' in (good / "_docs" / "nbs" / "references.html").read_text(encoding="utf-8")


def test_pages_are_whole(good):
    page = (good / "_docs" / "nbs" / "01_good.html").read_text(encoding="utf-8")
    assert 'data-module="udm_book.good"' in page  # exported code is marked
    assert "<math" in page and 'class="searchable"' in page
    assert (good / "_docs" / "nbs" / "01_good.ipynb").is_file() and 'href="01_good.ipynb" download' in page
    assert (good / "_docs" / "nbs" / "01_good_files" / "plot-0.png").is_file()
    assert 'href="nbs/01_good.html"' in (good / "_docs" / "index.html").read_text(encoding="utf-8")


def test_search_index(good):
    text = (good / "_docs" / "search.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("window.SEARCH = "))
    chapter = next(page for page in index if page["url"] == "nbs/01_good.html")
    assert any(name == "sec-part" and "needle" in body for name, _, body in chapter["parts"])


def test_nothing_is_loaded_from_the_network(good):
    for path in [*good.glob("_docs/**/*.html"), *good.glob("_docs/**/*.css"), *good.glob("_docs/**/*.js")]:
        text = path.read_text(encoding="utf-8")
        remote = r"""(?:src|srcset)=["']?(?:https?:)?//|<link[^>]+href=["']?(?:https?:)?//|url\(["']?https?:|fetch\("""
        assert not re.search(remote, text), path


def test_rendering_again_does_nothing(good):
    assert "nothing changed" in render(good)[1]


# -------------------------------------------------------------------------------------------------------------- keys


def test_directives():
    flags, options, body = nbfilter.parse('#| export\n#| label: fig-x\n#| fig-alt: one\n#|   two\nx = 1\n')
    assert flags == {"export": ""} and body == "x = 1\n"
    assert options == {"label": "fig-x", "fig-alt": "one\n   two"}


@pytest.fixture
def library(tmp_path):
    """A project whose chapter reaches module `far` through `near`, but not `other`."""
    (tmp_path / "nbs").mkdir()
    (tmp_path / "udm_book").mkdir()
    modules = {
        "__init__": '__version__ = "1"\n',
        "near": '"""Subtitle."""\n\n# %% ../nbs/02.ipynb #aa\nfrom .far import f\n',
        "far": "def f(): return 1\n",
        "lazy": "x = 1\n",
        "other": "x = 1\n",
    }
    for name, text in modules.items():
        (tmp_path / "udm_book" / f"{name}.py").write_text(text)
    (tmp_path / "nbs" / "facts.toml").write_text("a = 1\n")
    (tmp_path / "nbs" / "assets").mkdir()
    (tmp_path / "nbs" / "assets" / "book.mplstyle").write_text("font.size: 1\n")
    code = "#| depends: facts.toml\nfrom udm_book.near import f\n%time 1\ndef g():\n    from udm_book import lazy\n"
    code += "    style = 'assets/book.mplstyle'\n"
    save(tmp_path / "nbs" / "01_a.ipynb", cell(None, "prose"), cell("a", code))
    save(tmp_path / "nbs" / "02_b.ipynb", cell("b", "1"))
    save(tmp_path / "nbs" / "90_c.ipynb", cell("c", "#| depends: results"))
    for path in sorted(tmp_path.glob("nbs/*.ipynb")):
        notebook = notebooks.read(path)
        notebook["metadata"]["udm_book"] = {"results": []}
        notebook["metadata"]["udm_book"]["key"] = notebooks.key(path, notebook, notebooks.Sources(tmp_path))
        path.write_text(json.dumps(notebook))
    assert not stale(tmp_path)
    return tmp_path


def stale(root):
    """Stems of the stale notebooks."""
    return {path.stem for path in notebooks.find(root) if notebooks.is_stale(path, notebooks.Sources(root))}


@pytest.mark.parametrize(
    "file, old, new, expected",
    [
        ("nbs/01_a.ipynb", "prose", "poetry", set()),
        ("nbs/01_a.ipynb", "def g", "def h", {"01_a"}),
        ("udm_book/near.py", "import f", "import f as g", {"01_a"}),
        ("udm_book/far.py", "1", "2", {"01_a"}),
        ("udm_book/lazy.py", "1", "2", {"01_a"}),
        ("udm_book/other.py", "1", "2", set()),
        ("udm_book/near.py", "Subtitle", "Other subtitle", set()),
        ("udm_book/near.py", "#aa", "#bb", set()),
        ("udm_book/__init__.py", '"1"', '"2"', set()),
        ("nbs/facts.toml", "1", "2", {"01_a"}),
        ("nbs/assets/book.mplstyle", "1", "2", {"01_a"}),
        ("nbs/02_b.ipynb", '"results": []', '"results": [{"id": "x", "kind": "law"}]', {"90_c"}),
    ],
)
def test_stale(library, file, old, new, expected):
    edit(library / file, old, new)
    assert stale(library) == expected


# ------------------------------------------------------------------------------------------------------------ runner

LEDGER = '''
class Ledger:
    def __init__(self): self.made = []
    def show(self, id, latex):
        from IPython.display import Markdown, display
        display(Markdown(f"$$ {latex} $$ {{#eq-{id.replace('.', '-')}}}"))
        self.made.append(dict(id=id, kind="shown", latex=latex))
    def check(self, id, kind, holds):
        assert holds, f"statement {id}: its {kind} failed"
        self.made.append(dict(id=id, kind=kind, how="test"))
    def results(self): return list(self.made)
'''
SETUP = "#| hide\nfrom udm_book.ledger import Ledger\nledger = Ledger()"


def execute(root, *arguments):
    """Run the runner: (exit code, output)."""
    command = [sys.executable, TOOLS / "execute.py", "--root", root, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.returncode, run.stdout + run.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with four chapters, run once."""
    root = tmp_path_factory.mktemp("project")
    (root / "nbs").mkdir()
    (root / "udm_book").mkdir()
    (root / "udm_book" / "__init__.py").write_text("")
    (root / "udm_book" / "ledger.py").write_text(LEDGER)
    (root / "udm_book" / "double.py").write_text("def double(x): return 2 * x\n")
    check = 'from udm_book.double import double\nledger.check("udm.02", "law", double(3) == 6)'
    slow = '#| slow\nledger.check("udm.03", "montecarlo", True)\nprint(id(ledger) and object())'
    setup = cell("setup", SETUP)
    save(root / "nbs" / "01_shown.ipynb", setup, cell("show", 'ledger.show("udm.01", "a = b")'))
    save(root / "nbs" / "02_check.ipynb", setup, cell("check", check))
    save(root / "nbs" / "03_slow.ipynb", setup, cell("train", slow))
    total = (
        "#| depends: results\nimport json, pathlib\n"
        "files = [json.loads(f.read_text()) for f in sorted(pathlib.Path().glob('0*.ipynb'))]\n"
        "print(sum(len(nb['metadata']['udm_book']['results']) for nb in files))"
    )
    save(root / "nbs" / "90_total.ipynb", cell("total", total))
    code, text = execute(root)
    assert code == 0, text
    return root


def test_run_stores_results(project):
    assert not stale(project)
    shown = notebooks.read(project / "nbs" / "01_shown.ipynb")
    assert notebooks.record(shown)["results"] == [{"id": "udm.01", "kind": "shown", "latex": "a = b"}]
    slow = notebooks.read(project / "nbs" / "03_slow.ipynb")
    assert [item.get("slow") for item in notebooks.record(slow)["results"]] == [True]
    total = notebooks.read(project / "nbs" / "90_total.ipynb")  # ran after the others were stored
    assert nbfilter.source(total["cells"][0]["outputs"][0]["text"]) == "3\n"


def test_second_run_has_the_same_bytes(project):
    code, text = execute(project, "--verify")
    assert code == 0 and text.count("same bytes") == 4, text


def test_check_is_fast_and_imports_no_torch(project):
    program = "import sys; sys.argv[1:] = ['--check', '--root', sys.argv[1]]; import execute\n"
    program += "try: execute.main()\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules)"
    command = [sys.executable, "-c", program, project]
    run = subprocess.run(command, cwd=TOOLS, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False False"


def test_planted_errors_are_noticed(project, tmp_path):
    root = tmp_path / "project"
    shutil.copytree(project, root)
    edit(root / "nbs" / "01_shown.ipynb", "a = b $$", "a = -b $$")  # what is shown is not what was checked
    edit(root / "udm_book" / "double.py", "2 * x", "3 * x")  # a wrong coefficient in the library
    edit(root / "nbs" / "03_slow.ipynb", '"kind": "montecarlo"', '"kind": "proof"')
    code, text = execute(root, "--check")
    assert code == 1 and re.findall(r"stale outputs: nbs/(\w+)", text) == ["02_check", "90_total"]
    code, text = execute(root, "--test")
    assert code == 1
    assert "statement udm.01 (cell show): the displayed formula is not the checked one" in text
    assert "a = -b" in text and "a = b" in text
    assert "statement udm.02: its law failed" in text and "cell check raised AssertionError" in text
    assert "udm.03" not in text  # slow cells take no part
    code, text = execute(root, "--test", "--slow", "03_slow")
    assert code == 1
    assert "statement udm.03: its stored check of kind `proof` was not made by this run" in text
    before = (root / "nbs" / "02_check.ipynb").read_bytes()
    code, text = execute(root)  # stores nothing for a notebook that fails, nor for those that need its results
    assert code == 1 and "90_total" in text.split("not run")[1]
    assert (root / "nbs" / "02_check.ipynb").read_bytes() == before

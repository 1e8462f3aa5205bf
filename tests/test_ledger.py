"""The ledger: formulas print as written, wrong ones fail by name, and nothing in the book goes without its check."""
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import traceback
from pathlib import Path

import pytest
import sympy as sp

from udm_book import ledger as module
from udm_book.ledger import KINDS, Ledger, attempt, audit, collect, flat, is_zero, label, solution

ROOT = Path(__file__).resolve().parent.parent
x, y = sp.symbols("x y", positive=True)
z = sp.symbols("z", real=True)

# Chapters all of whose statements are in the book. The others of the inventory are shown as open in chapter 90; a
# chapter is added here with its last statement, and from then on the book fails where one of them loses its check.
FINISHED = (1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 21, 30, 31, 32, 41, 50, 52, 53, 54)


@pytest.fixture
def ledger(tmp_path):
    path = tmp_path / "statements.toml"
    path.write_text("".join(f'[[statement]]\nid = "{id}"\nkind = "{kind}"\nchapter = {n}\n' for id, kind, n in [
        ("toy.1", "identity", 1), ("toy.2", "definition", 1), ("toy.3", "claim", 2)]))
    return Ledger(path)


# -------------------------------------------------------------------------------------------------------- the mechanism


@pytest.mark.parametrize("write, latex", [
    (lambda: y + x, "y + x"),
    (lambda: y * x + x * 2, r"y x + x 2"),
    (lambda: (y + x) + (x + 1), "y + x + x + 1"),
    (lambda: sp.sqrt(1 - x**2) * y, r"\sqrt{1 - x^{2}} y"),
    (lambda: y - x, "y - x"),
    (lambda: x / y, r"\frac{x}{y}"),
])
def test_equations_print_as_they_were_written(ledger, write, latex):
    with sp.evaluate(False): rhs = write()
    assert ledger.equation("toy.1", sp.Symbol("L"), rhs).latex == "L = " + latex


def test_flat_changes_the_form_alone():
    with sp.evaluate(False): e = (y + (x + (1 + x))) * ((2 * x) * y) ** (x + (y + 1))
    assert sp.simplify(flat(e).doit() - e.doit()) == 0
    assert all(b.func is not a.func for a in sp.preorder_traversal(flat(e)) if isinstance(a, (sp.Add, sp.Mul)) for b in a.args)


@pytest.mark.parametrize("zero", [
    0 * x, (x + y) ** 2 - x**2 - 2 * x * y - y**2, sp.sqrt(x**2) - x, sp.sin(z) ** 2 + sp.cos(z) ** 2 - 1])
def test_zeros_are_found(zero):
    assert is_zero(sp.sympify(zero))


@pytest.mark.parametrize("other", [x - y, sp.sqrt(z**2) - z, sp.Integer(1), x * sp.Float("1e-30"), sp.sin(x) - x, z**2 - z])
def test_what_is_not_zero_is_not(other):
    assert not is_zero(other)


def test_a_wrong_simplification_does_not_pass(monkeypatch):
    "Should simplify ever return 0 for something else, the random points object."
    monkeypatch.setattr(sp, "simplify", lambda e: sp.Integer(0))
    assert not is_zero(x - y)
    assert is_zero(sp.sqrt(x**2) - x)


def test_a_proof_needs_simplification_too(monkeypatch):
    "Equal at three points is not yet equal."
    monkeypatch.setattr(sp, "simplify", lambda e: e)
    assert not is_zero(sp.sin(z) ** 2 + sp.cos(z) ** 2 - 1)


def test_proofs_are_recorded_and_wrong_ones_raise_by_name(ledger):
    eq = ledger.equation("toy.1", y, x / 2)
    eq.prove(2 * eq.rhs, x, "twice the half")
    assert ledger.results() == [dict(id="toy.1", kind="shown", latex=eq.latex), dict(id="toy.1", kind="proof", how="twice the half")]
    with pytest.raises(AssertionError, match=r"statement toy\.1: its proof failed \(badly\): the two sides differ by 2\*x"):
        eq.prove(3 * x, x, "badly")
    assert len(ledger.results()) == 2


def test_the_function_is_the_right_hand_side(ledger):
    import torch
    f = ledger.equation("toy.1", z, sp.sqrt(x) * y - sp.exp(y)).torch(x, y)
    a, b = torch.tensor([1.0, 4.0]), torch.tensor([2.0, -1.0])
    torch.testing.assert_close(f(a, b), a.sqrt() * b - b.exp())


def test_rewrite_reaches_proof_and_function_but_not_the_display(ledger, monkeypatch):
    monkeypatch.setattr(Ledger, "rewrite", staticmethod(lambda id, rhs: rhs + 1 if id == "toy.1" else rhs))
    eq = ledger.equation("toy.1", y, x / 2)
    assert eq.torch(x)(4.0) == 3 and "+ 1" not in eq.latex
    with pytest.raises(AssertionError, match="toy.1"): eq.prove(2 * eq.rhs, x, "twice")


@pytest.mark.parametrize("error", [AssertionError("off by 3"), ValueError("bad"), KeyError("k")])
def test_checks_raise_by_name_and_record_nothing(ledger, error):
    with pytest.raises(AssertionError, match=r"statement toy\.3: its law failed \(how\).*" + str(error.args[0])) as caught:
        with ledger.check("toy.3", "law", "how"): raise error
    assert caught.value.__cause__ is error and ledger.results() == []


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_checks(ledger, kind):
    with ledger.check("toy.1", kind, "how"): pass
    assert ledger.results() == [dict(id="toy.1", kind=kind, how="how")]


def test_unknown_kinds_and_statements_raise_before_the_block_runs(ledger):
    for id, kind, error, message in [("toy.1", "shown", ValueError, "among proof, law.*got 'shown'"),
                                     ("toy.9", "law", KeyError, "no statement 'toy.9'")]:
        with pytest.raises(error, match=message):
            with ledger.check(id, kind, "how"): pytest.fail("the block ran")
    for show in (lambda: ledger.statement("toy.9", "x"), lambda: ledger.equation("toy.9", x, y), lambda: ledger.cite("toy.9", "how")):
        with pytest.raises(KeyError, match="toy.9"): show()
    assert ledger.results() == []


def test_a_statement_is_displayed_once(ledger):
    ledger.statement("toy.1", "a")
    with pytest.raises(ValueError, match="toy.1 is displayed twice"): ledger.equation("toy.1", x, y)


def test_labels_and_what_a_notebook_displays(ledger, monkeypatch):
    shown = []
    monkeypatch.setattr(module, "_show", lambda html="", markdown="": shown.append(html or markdown))
    assert label("toy.1-a(b)") == "eq-toy-1-a-b-"
    ledger.statement("toy.1", r"\alpha")
    with ledger.check("toy.1", "law", "1 < 2"): pass
    ledger.cite("toy.3", "they say")
    assert shown[0] == "$$\n\\alpha\n$$ {#eq-toy-1}"
    assert "✓ 1 &lt; 2 <code>toy.1 · law</code>" in shown[1] and "toy.3 · cited" in shown[2]


def test_exercises_say_whether_they_are_solved(monkeypatch):
    shown = []
    monkeypatch.setattr(module, "_show", lambda html="", markdown="": shown.append(html))
    def check(answer): assert answer == 4, "not four"
    attempt(check, 5)
    attempt(check, 4)
    solution(check, 4)
    assert ["not yet: not four" in shown[0], "solved" in shown[1], "solved" in shown[2]] == [True] * 3 and len(shown) == 3
    with pytest.raises(AssertionError, match="not four"): solution(check, 5)


def test_audit_names_every_gap():
    inventory = {id: dict(kind=kind, chapter=n) for id, kind, n in [
        ("a", "identity", 1), ("b", "definition", 1), ("c", "claim", 1), ("d", "empirical", 2), ("e", "claim", 3)]}
    sound = {1: [dict(id=i, kind="shown") for i in "abc"] + [dict(id=i, kind="proof") for i in "ac"],
             2: [dict(id="d", kind="shown"), dict(id="d", kind="cited")]}
    assert audit(inventory, sound) == []                                            # chapter 3 is still to come
    def without(i, kind): return {n: [r for r in results if (r["id"], r["kind"]) != (i, kind)] for n, results in sound.items()}
    for i, kind in [("a", "proof"), ("c", "proof"), ("d", "cited"), ("b", "shown"), ("a", "shown")]:
        complaint, = audit(inventory, without(i, kind))
        assert complaint.startswith(f"statement {i}:") and ("not shown" in complaint) == (kind == "shown")
    complaint, = audit(inventory, {1: sound[1] + [dict(id="q", kind="law")], 2: sound[2]})
    assert complaint.startswith("statement q:") and "chapter 1" in complaint


def test_collect_reads_the_stored_results(tmp_path):
    found = {"udm_book": {"results": [{"id": "a"}]}}
    for name, meta in [("01_a", found), ("02_b", {}), ("notes", found)]:
        (tmp_path / f"{name}.ipynb").write_text(json.dumps({"metadata": meta}))
    assert collect(tmp_path) == {"01_a": [{"id": "a"}]}


# --------------------------------------------------------------------------------------------------- four planted errors

CELLS = [
    '#| hide\n#| depends: statements.toml\nimport sympy as sp\nfrom udm_book.ledger import Ledger\n'
    'from udm_book.toy_NAME import half\nledger = Ledger("statements.toml")\nx, y = sp.symbols("x y", positive=True)',
    'eq = ledger.equation("toy.NAME", y, x / 2)',
    'eq.prove(eq.rhs + eq.rhs, x, "two halves are the whole")',
    'with ledger.check("toy.NAME", "law", "the function is the formula"):\n    assert half(6.0) == eq.torch(x)(6.0)',
]
PLANTS = ("proof", "code", "shown", "check")


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) >= 1, f"nothing to plant in {path}"
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A book of four chapters that passes, then one error in each: what the runner says before and after."""
    root = tmp_path_factory.mktemp("toy")
    (root / "nbs").mkdir()
    (root / "udm_book").mkdir()
    for name in "__init__.py", "ledger.py": shutil.copy(ROOT / "udm_book" / name, root / "udm_book")
    for n, name in enumerate(PLANTS, 1):
        cells = [dict(cell_type="code", id=f"c{i}", metadata={}, outputs=[], execution_count=None, source=text.replace("NAME", name))
                 for i, text in enumerate(CELLS)]
        (root / f"nbs/0{n}_{name}.ipynb").write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
        (root / f"udm_book/toy_{name}.py").write_text("def half(x): return 0.5 * x\n")
    (root / "nbs/statements.toml").write_text("".join(
        f'[[statement]]\nid = "toy.{name}"\nkind = "identity"\nchapter = {n}\n' for n, name in enumerate(PLANTS, 1)))

    def execute(*args):
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run([sys.executable, ROOT / "tools/execute.py", "--root", root, *args], capture_output=True, text=True, env=env)

    def gaps():
        inventory = {e["id"]: e for e in tomllib.loads((root / "nbs/statements.toml").read_text())["statement"]}
        return audit(inventory, {int(name[:2]): results for name, results in collect(root / "nbs").items()})

    sound, no_gaps = execute(), gaps()
    edit(root / "nbs/01_proof.ipynb", "eq.rhs + eq.rhs", "eq.rhs - eq.rhs")
    edit(root / "udm_book/toy_code.py", "0.5", "0.25")
    edit(root / "nbs/03_shown.ipynb", r"\\frac{x}{2}", r"\\frac{x}{3}")
    notebook = json.loads((root / "nbs/04_check.ipynb").read_text())
    notebook["cells"] = notebook["cells"][:2]                                       # shown, but neither proved nor compared
    (root / "nbs/04_check.ipynb").write_text(json.dumps(notebook))
    test = execute("--test")
    stored = execute("04_check")
    return dict(sound=sound, no_gaps=no_gaps, test=test, stored=stored, gaps=gaps())


def test_the_sound_book_passes(planted):
    assert planted["sound"].returncode == 0, planted["sound"].stdout + planted["sound"].stderr
    assert planted["no_gaps"] == []


@pytest.mark.parametrize("name, says", [
    ("proof", "statement toy.proof: its proof failed (two halves are the whole): the two sides differ by -x"),
    ("code", "statement toy.code: its law failed (the function is the formula)"),
    ("shown", "statement toy.shown (cell c1): the displayed formula is not the checked one"),
    ("check", "statement toy.check: its stored check of kind `proof` was not made by this run"),
])
def test_a_planted_error_fails_and_names_its_statement(planted, name, says):
    assert planted["test"].returncode == 1
    assert says in planted["test"].stdout


def test_a_statement_without_a_check_is_a_gap_even_once_it_is_stored(planted):
    assert planted["stored"].returncode == 0
    complaint, = planted["gaps"]
    assert complaint.startswith("statement toy.check: no check")


# --------------------------------------------------------------------------------------------------------- the real book


def inventory():
    return {e["id"]: e for e in tomllib.loads((ROOT / "nbs/statements.toml").read_text(encoding="utf-8"))["statement"]}


def test_finished_chapters_show_and_check_every_statement():
    results = {int(name.partition("_")[0]): found for name, found in collect(ROOT / "nbs").items()}
    missing = [n for n in FINISHED if n not in results and any(e["chapter"] == n for e in inventory().values())]
    assert not missing, f"chapters without any recorded result: {missing}"
    complaints = audit(inventory(), {n: found for n, found in results.items() if n in FINISHED})
    assert not complaints, "\n".join(complaints)


def test_statements_stand_in_the_chapter_that_the_inventory_says():
    known = inventory()
    for name, results in collect(ROOT / "nbs").items():
        wrong = [r["id"] for r in results if r["kind"] == "shown" and known[r["id"]]["chapter"] != int(name.partition("_")[0])]
        assert not wrong, f"{name} shows statements of other chapters: {wrong}"


def test_the_inventory_is_sound():
    entries = tomllib.loads((ROOT / "nbs/statements.toml").read_text(encoding="utf-8"))["statement"]
    keys = set(re.findall(r"^@\w+\{(.+?),", (ROOT / "nbs/references.bib").read_text(encoding="utf-8"), re.M)) | {"derived"}
    kinds = {"definition", "identity", "derivation", "approximation", "algorithm", "claim", "empirical"}
    assert len({e["id"] for e in entries}) == len(entries) >= 243
    assert len({label(e["id"]) for e in entries}) == len(entries)
    for e in entries:
        assert e["kind"] in kinds and e["source"] in keys and e["says"] and isinstance(e["chapter"], int), e["id"]


def test_stored_outputs_are_fresh():
    out = subprocess.run([sys.executable, ROOT / "tools/execute.py", "--root", ROOT, "--check"], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout


# ------------------------------------------------------------------------------------------- every equation has teeth


def perturbed(rhs):
    """Wrong versions of a right-hand side: a sign, a factor, two letters for one another."""
    terms = list(rhs.args) if isinstance(rhs, sp.Add) else [rhs]
    yield "sign", sp.Add(*terms[:-1], -terms[-1]) if rhs != 0 else sp.Integer(1)
    yield "factor", sp.Add(2 * terms[0], *terms[1:]) if rhs != 0 else sp.Integer(2)
    letters = sorted(getattr(rhs, "free_symbols", ()), key=str)
    for a, b in zip(letters, letters[1:]):
        swapped = rhs.subs({a: b, b: a}, simultaneous=True)
        if sp.simplify(swapped - rhs) != 0:
            yield f"{a} for {b}", swapped
            return


def run_cell(text, namespace):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(text, "cell", "exec"), namespace)


def in_fork(body):
    """What `body()` returns, computed in a fork of this process: a string."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        try: answer = body()
        except BaseException: answer = "the test itself failed: " + traceback.format_exc()[-3500:]
        os.write(write, answer.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe: answer = pipe.read()
    os.waitpid(pid, 0)
    return answer


def survives(id, kind, cells, namespace):
    """'' if the perturbed equation `id` makes one of `cells` fail by name, else what happened. Runs in a fork."""
    def rewrite(name, rhs): return dict(perturbed(rhs)).get(kind, rhs) if name == id else rhs
    Ledger.rewrite = staticmethod(rewrite)
    try:
        for text in cells: run_cell(text, namespace)
    except Exception as e:
        return "" if isinstance(e, AssertionError) and f"statement {id}:" in str(e) else f"{id} ({kind}): {e!r} instead of a failed check"
    return f"{id} ({kind}): no check noticed"


def chapters_with_equations():
    return [p for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")) if "ledger.equation(" in p.read_text(encoding="utf-8")]


@pytest.mark.slow
@pytest.mark.parametrize("path", chapters_with_equations(), ids=lambda p: p.stem)
def test_a_perturbed_equation_fails_its_checks_by_name(path, monkeypatch):
    """Each equation of a chapter, made wrong in three ways, fails in one of the cells that follow it.

    The chapter runs once; at every cell that states an equation, forks of it run on with the wrong one.
    """
    monkeypatch.chdir(path.parent)
    import matplotlib
    matplotlib.use("Agg")
    skip = re.compile(r"^#\| *(slow|notest|eval: *false)", re.M)
    cells = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    cells = [re.sub(r"^(\s*)[%!].*$", r"\1pass", c, flags=re.M) for c in cells if not skip.search(c)]
    namespace, bad, count = {"__name__": "__main__"}, [], 0
    for i, text in enumerate(cells):
        if "ledger.equation(" in text:
            answer = in_fork(lambda: json.dumps(equations_of(text, namespace)))
            assert answer.startswith("["), answer
            found = json.loads(answer)
            count += len(found)
            bad += [in_fork(lambda: survives(id, kind, cells[i:], namespace)) for id, kinds in found for kind in kinds]
        run_cell(text, namespace)
    assert count, "no equation was stated"
    assert not any(bad), "\n".join(filter(None, bad))


def equations_of(text, namespace):
    """The equations that a cell states, with the ways in which each can be made wrong. Runs in a fork."""
    seen, original = [], Ledger.equation
    Ledger.equation = lambda self, id, lhs, rhs: seen.append((id, [k for k, _ in perturbed(rhs.doit())])) or original(self, id, lhs, rhs)
    run_cell(text, namespace)
    return seen

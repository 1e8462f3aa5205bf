#!/usr/bin/env python3
"""Run the notebooks: each in a fresh process, two at a time, with byte-stable outputs stored in the files.

    execute.py [NOTEBOOK ...]    run those whose outputs are stale; store outputs, key and check results
    execute.py --force           run all of them
    execute.py --check           only say which ones are stale
    execute.py --verify          run all, store nothing, fail unless the bytes are the same
    execute.py --test [--slow]   run all but the slow cells (or all cells), store nothing, fail where a cell raises
                                 or where checks and displayed statements differ from the stored ones
"""
import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path

import notebooks as nbs
from nbfilter import parse, source

ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "SOURCE_DATE_EPOCH": "0",
    "COLUMNS": "100",
    "TQDM_DISABLE": "1",  # no progress bars in stored outputs
    "IN_TEST": "1",
}
PNG = "dict(dpi=150, metadata={'Software': None})"
HEX_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
LABEL = re.compile(r"\{#((?:eq|thm|lem|cor|prp|def|exm)-[\w:.-]+)")


# ------------------------------------------------------------------------------------------- in the notebook's process


def libraries(path, sources):
    """Which large libraries the notebook, or a module of the library that it imports, mentions."""
    texts = [nbs.python(cell) for cell in nbs.code_cells(nbs.read(path))]
    texts += [sources.text(name) for name in sources.reached(texts)]
    return {name for name in ("torch", "sympy") if any(name in text for text in texts)}


def prepare(names):
    """Import what the notebooks need, once, before the processes fork. No torch operation happens here."""
    for name in ("hypothesis", "matplotlib.pyplot", "execnb.shell", "nbdev.clean", *sorted(names)):
        importlib.import_module(name)


def new_shell(names):
    """A fresh IPython shell with fixed seeds, one thread, derandomised property tests and reproducible figures."""
    import random

    import hypothesis
    import matplotlib
    import numpy
    from execnb.shell import CaptureShell

    numpy.random.seed(0)
    random.seed(0)
    if "torch" in names:
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)
    hypothesis.settings.register_profile("book", derandomize=True, deadline=None, database=None)
    hypothesis.settings.load_profile("book")
    matplotlib.rcParams["svg.hashsalt"] = "book"
    shell = CaptureShell(history=False)
    shell._run(f"set_matplotlib_formats('png', **{PNG}); del set_matplotlib_formats")
    return shell


def is_skipped(cell, slow):
    """Whether a run leaves the cell out: `slow` says whether slow cells take part."""
    flags, options, _ = parse(source(cell))
    return options.get("eval", "").strip() == "false" or (not slow and bool({"slow", "notest"} & flags.keys()))


def ledger_results(shell):
    """What the notebook's ledger has recorded so far."""
    ledger = shell.user_ns.get("ledger")
    results = ledger.results() if hasattr(ledger, "results") else []
    return json.loads(json.dumps(results))


def count(results):
    """Results as a multiset, which dicts can't be members of."""
    return Counter(json.dumps({k: v for k, v in item.items() if k != "slow"}, sort_keys=True) for item in results)


def stabilise(notebook):
    """Remove from the outputs what differs between two runs: counters, addresses, ids of animations."""
    from nbdev.clean import clean_nb

    clean_nb(notebook, allowed_metadata_keys=[nbs.LIBRARY])
    for cell in nbs.code_cells(notebook):
        ids = {}

        def stable(match):
            return ids.setdefault(match[0], hashlib.sha256(f"{cell['id']}/{len(ids)}".encode()).hexdigest()[:32])

        for output in cell["outputs"]:
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text"):
                    lines = [value] if isinstance(value, str) else value
                    output["data"][kind] = [HEX_ID.sub(stable, line) for line in lines]


def failure(cell, exception):
    """A report of what a cell raised: where, which line, and the traceback without the machinery's frames."""
    import traceback

    frames = traceback.extract_tb(exception.__traceback__)
    first = next((i for i, frame in enumerate(frames) if "ipython-input" in frame.filename), 0)
    lines = traceback.format_list(frames[first:]) + traceback.format_exception_only(exception)
    trace = re.sub(r'File "<ipython-input-[^>]*>"', f'File "cell {cell["id"]}"', "".join(lines))
    return f"cell {cell['id']} raised {type(exception).__name__}\n{trace}"


def run(path, slow, names, send):
    """Run the notebook in file `path`; give back the notebook with outputs, timings by cell and an error or None."""
    from execnb.nbio import nb2str, read_nb

    os.chdir(path.parent)
    notebook = read_nb(path.name)
    shell = new_shell(names)
    timings = {}
    slow_results = Counter()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells, 1):
        if is_skipped(cell, slow):
            if slow:
                cell.outputs = []
            continue
        send(("cell", f"{number}/{len(cells)}"))
        cell.outputs = []
        before = count(ledger_results(shell))
        start = time.time()
        shell.cell(cell)
        timings[cell.id] = time.time() - start
        if shell.exc:
            return None, timings, failure(cell, shell.exc)
        if "slow" in parse(source(cell))[0]:
            slow_results += count(ledger_results(shell)) - before
    results = ledger_results(shell)
    for item in results:
        if slow_results[json.dumps(item, sort_keys=True)] > 0:
            item["slow"] = True
    notebook.metadata[nbs.LIBRARY] = {"results": results}
    stabilise(notebook)
    return json.loads(nb2str(notebook)), timings, None


def child(path, slow, names, pipe):
    """Body of a notebook's process: run it and send what came of it through `pipe`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        pipe.send(("done", run(path, slow, names, pipe.send)))
    except Exception as exception:
        pipe.send(("done", (None, {}, f"the runner failed: {type(exception).__name__}: {exception}")))
    pipe.close()


# -------------------------------------------------------------------------------------------------- in the main process


class Terminal:
    """One line per finished notebook and, on a terminal, a line below that shows what is running."""

    def __init__(self, total):
        self.total, self.done, self.live = total, 0, sys.stdout.isatty()

    def show(self, running):
        """Rewrite the line of running notebooks."""
        if self.live:
            parts = (f"{job.path.stem} cell {job.cell} {time.time() - job.start:.0f} s" for job in running)
            print("\r\x1b[K" + ("  running: " + ", ".join(parts))[:118], end="", flush=True)

    def line(self, path, status, seconds, timings):
        """Report a finished notebook."""
        self.done += 1
        cell = max(timings, key=timings.get, default=None)
        slowest = f" (slowest cell {cell} {timings[cell]:.1f} s)" if cell else ""
        clear = "\r\x1b[K" if self.live else ""
        print(f"{clear}[{self.done}/{self.total}] {path.stem:<22} {seconds:5.1f} s  {status}{slowest}", flush=True)

    def text(self, text):
        """Print indented text below the line."""
        print("\n".join("    " + line for line in text.rstrip().splitlines()), flush=True)


class Job:
    """A notebook that runs in a process of its own."""

    def __init__(self, path, slow, names):
        context = multiprocessing.get_context("fork")
        self.path, self.start, self.cell = path, time.time(), "-"
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=child, args=(path, slow, names, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def poll(self):
        """Read one message; the outcome (notebook, timings, error) when it was the last."""
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            self.process.join()
            return None, {}, f"the process died with exit code {self.process.exitcode} in cell {self.cell}"
        if kind == "cell":
            self.cell = value
            return None
        self.process.join()
        return value


def run_all(paths, slow, jobs, terminal):
    """Run notebooks (path -> libraries), `jobs` at a time; yields (path, seconds, outcome) as they finish."""
    waiting, running = list(paths.items()), []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                path, names = waiting.pop(0)
                running.append(Job(path, slow, names))
            terminal.show(running)
            ready = wait([job.pipe for job in running], timeout=1)
            for job in [job for job in running if job.pipe in ready]:
                outcome = job.poll()
                if outcome is not None:
                    running.remove(job)
                    yield job.path, time.time() - job.start, outcome
    finally:
        for job in running:
            job.process.terminate()


def as_text(notebook):
    """The notebook as nbdev writes it: sorted keys, indent 1."""
    return json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def statement_id(label, results):
    """The statement that a label stands for: eq-udm-10 is udm.10."""
    slug = label.partition("-")[2]
    ids = {re.sub(r"[^A-Za-z0-9]", "-", item["id"]): item["id"] for item in results}
    return ids.get(slug, slug)


def displayed(cell):
    """Labelled statements among the outputs of a cell: label -> displayed markdown."""
    texts = (source(output.get("data", {}).get("text/markdown")) for output in cell.get("outputs", []))
    return {label: text.strip() for text in texts for label in LABEL.findall(text)}


def compare(stored, fresh, slow):
    """What a test run shows otherwise than the stored notebook: a list of messages that name the statements."""
    messages = []
    old, new = nbs.record(stored).get("results", []), nbs.record(fresh)["results"]
    known = old + new
    cells = {cell["id"]: cell for cell in nbs.code_cells(stored)}
    for cell in nbs.code_cells(fresh):
        if is_skipped(cell, slow):
            continue
        was, now = displayed(cells[cell["id"]]), displayed(cell)
        for label in sorted(was.keys() | now.keys()):
            if was.get(label) != now.get(label):
                shown, checked = was.get(label, "(nothing)"), now.get(label, "(nothing)")
                name = statement_id(label, known)
                messages.append(
                    f"statement {name} (cell {cell['id']}): the displayed formula is not the checked one"
                    f"\n  stored and shown: {shown}\n  printed by the run: {checked}"
                )
    old = Counter((item["id"], item["kind"]) for item in old if slow or not item.get("slow"))
    new = Counter((item["id"], item["kind"]) for item in new if slow or not item.get("slow"))
    for (name, kind), _ in sorted((old - new).items()):
        messages.append(f"statement {name}: its stored check of kind `{kind}` was not made by this run")
    for (name, kind), _ in sorted((new - old).items()):
        messages.append(f"statement {name}: a check of kind `{kind}` was made that is not stored (run `make book`)")
    return messages


def finish(mode, path, notebook, slow, root):
    """Deal with a notebook that ran through: (status, list of complaints)."""
    if mode == "test":
        complaints = compare(nbs.read(path), notebook, slow)
        return ("FAILED" if complaints else "ok"), complaints
    stored = nbs.read(path)
    if [source(cell) for cell in stored["cells"]] != [source(cell) for cell in notebook["cells"]]:
        return "FAILED", ["the file was edited while it ran: run again"]
    notebook["metadata"][nbs.LIBRARY]["key"] = nbs.key(path, notebook, nbs.Sources(root))
    text = as_text(notebook)
    same = text == path.read_text(encoding="utf-8")
    if mode == "verify":
        return ("same bytes" if same else "FAILED"), ([] if same else ["the outputs differ from the stored ones"])
    if not same:
        path.write_text(text, encoding="utf-8")
    return ("unchanged" if same else "updated"), []


def phases(paths, mode):
    """Notebooks in the order they may run: those that read the stored results come one phase after the others."""
    last = [path for path in paths if "results" in nbs.depends(nbs.read(path))]
    first = [path for path in paths if path not in last]
    return [first + last] if mode == "test" else [first, last]


def execute(root, paths, mode, slow, jobs):
    """Run notebooks in `mode` (run, force, verify, test); gives back the number of notebooks that failed."""
    failed = 0
    sources = nbs.Sources(root)
    for number, phase in enumerate(phases(paths, mode)):
        if mode == "run":
            phase = [path for path in phase if nbs.is_stale(path, sources)]
        if number and failed and phase:
            names = ", ".join(path.stem for path in phase)
            print(f"not run, since they read the results of notebooks that failed: {names}")
            break
        if not phase:
            continue
        print("importing libraries …", flush=True)
        needed = {path: libraries(path, sources) for path in phase}
        prepare(set().union(*needed.values()))
        print(f"running {len(phase)} notebook{'s' * (len(phase) > 1)}, {min(jobs, len(phase))} at a time", flush=True)
        terminal = Terminal(len(phase))
        for path, seconds, (notebook, timings, error) in run_all(needed, slow, jobs, terminal):
            status, complaints = ("FAILED", [error]) if error else finish(mode, path, notebook, slow, root)
            failed += bool(complaints)
            terminal.line(path, status, seconds, timings)
            for complaint in complaints:
                terminal.text(f"{path.stem}: {complaint}")
    return failed


def check(root, paths):
    """Print which notebooks are stale; gives back their number."""
    sources = nbs.Sources(root)
    stale = [path for path in paths if nbs.is_stale(path, sources)]
    for path in stale:
        print(f"stale outputs: nbs/{path.name} (its code or what it imports or reads has changed: run `make book`)")
    if not stale:
        print(f"{len(paths)} notebooks: outputs are fresh")
    return len(stale)


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", help="names such as 11_hot; all chapters when left out")
    for mode in ("check", "force", "verify", "test"):
        parser.add_argument("--" + mode, dest="mode", action="store_const", const=mode, default="run")
    parser.add_argument("--slow", action="store_true", help="with --test: slow cells too")
    parser.add_argument("--root", default=".", type=Path, help="folder of the project")
    parser.add_argument("-j", "--jobs", default=2, type=int, help="notebooks at a time")
    return parser.parse_args()


def main():
    """Do what the command line asks; exit 1 where something is stale or failed."""
    args = arguments()
    root = args.root.resolve()
    paths = nbs.find(root, args.notebooks)
    if args.mode == "check":
        sys.exit(check(root, paths) > 0)
    if os.environ.get("PYTHONHASHSEED") != "0":  # it must be set before Python starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    sys.path.insert(0, str(root))
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = folder
        try:
            failed = execute(root, paths, args.mode, args.slow or args.mode != "test", args.jobs)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)
    outcome = f"{failed} FAILED" if failed else "outputs fresh" if args.mode in ("run", "force") else "all passed"
    print(f"{len(paths)} notebooks: {outcome} ({time.time() - start:.1f} s)")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

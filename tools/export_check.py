#!/usr/bin/env python3
"""Say whether the library is what the notebooks export: export a copy elsewhere and compare, changing nothing here."""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def exported(root, folder):
    """Export the notebooks of project `root` into `folder`; {name: text} of the modules."""
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(root / name, folder)
    shutil.copytree(root / "nbs", folder / "nbs", ignore=lambda _, names: [n for n in names if n.startswith(".")])
    command = Path(sys.executable).with_name("nbdev_export")
    subprocess.run([command], cwd=folder, check=True, env={**os.environ, "PYTHONPATH": ""})
    return modules(folder)


def modules(root):
    """The library's modules below `root`: {name: text}."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(root.glob("udm_book/*.py"))}


def main():
    """Compare and name what differs; exit 1 where something does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default=".", type=Path)
    root = parser.parse_args().root.resolve()
    with tempfile.TemporaryDirectory() as folder:
        expected = exported(root, Path(folder))
    present = modules(root)
    wrong = [name for name in sorted(expected.keys() | present.keys()) if expected.get(name) != present.get(name)]
    for name in wrong:
        if name not in expected:
            print(f"udm_book/{name}: no notebook exports it; delete it")
        else:
            print(f"udm_book/{name} differs from what its notebook exports: run `make book`")
    if not wrong:
        print(f"{len(present)} files of the library: as exported from the notebooks")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

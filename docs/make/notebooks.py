"""Runs notebooks from top to bottom: `python docs/make/notebooks.py FROM TO`."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

CELL_S = 300


def main(sources: Path, target: Path) -> None:
    """Writes each notebook of `sources` with its outputs to `target`, if no cell fails."""
    target.mkdir(parents=True, exist_ok=True)
    for source in sorted(sources.glob("*.ipynb")):
        notebook = nbformat.read(source, as_version=4)
        here = {"metadata": {"path": str(target)}}
        NotebookClient(notebook, timeout=CELL_S, kernel_name="python3", resources=here).execute()
        nbformat.write(notebook, target / source.name)
        print(f"{target / source.name}: {len(notebook.cells)} cells")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

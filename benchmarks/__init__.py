"""Benchmarks: a module a table, each of which checks its outputs before it takes a time.

From the root of the repository, with the package installed (``pip install -e .``) or on ``PYTHONPATH``::

    python -m benchmarks                    # what there is
    python -m benchmarks.scan --help
    python -m benchmarks.scan --cases "D 8192" --json results.json

``-m`` puts the root on the import path, where the folders kernels/ and launch/ would stand in for other packages of
these names, and the folder tp_mamba/ for the installed package. So this module, which is imported before any
benchmark, takes the root off the path again.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

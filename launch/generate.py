"""``python -m tp_mamba.launch.generate ...``: the older form of ``python -m tp_mamba.launch generate ...``."""

import sys

from tp_mamba.launch.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))

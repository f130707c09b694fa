"""``python -m tp_mamba.launch.verify ...``: the older form of ``python -m tp_mamba.launch verify ...``."""

import sys

from tp_mamba.launch.cli import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))

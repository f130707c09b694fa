"""``torchrun ... -m tp_mamba.launch.train ...``: as ``python -m tp_mamba.launch train ...``."""

import sys

from tp_mamba.launch.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

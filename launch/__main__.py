"""``python -m tp_mamba.launch VERB ...``, which ``torchrun -m`` can start as well: the command ``tp-mamba``."""

import sys

from tp_mamba.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())

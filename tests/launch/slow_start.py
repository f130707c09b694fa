"""Two ranks that take a while to start, for tests/launch/test_interrupts.py; started ranks import it again."""

from __future__ import annotations

import os
import sys
import time

if __name__ == "__mp_main__":
    os.write(1, b"starting\n")
    time.sleep(1)

if __name__ == "__main__":
    import rank_jobs

    from tp_mamba.launch.ranks.signals import StoppedError
    from tp_mamba.launch.ranks.start import start_ranks

    try:
        start_ranks(rank_jobs.sleep_for_ever, size=2)
    except StoppedError as stopped:
        sys.exit(128 + stopped.signum)

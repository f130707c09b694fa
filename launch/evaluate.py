"""lm_eval's own command with this package's model in it: ``python -m tp_mamba.launch.evaluate run --model tp_mamba``.

From 0.4.14 on, lm_eval finds the model by itself, by the entry point that this package declares.
"""

from lm_eval.__main__ import cli_evaluate

import tp_mamba.launch.evaluation.model  # noqa: F401  # registers it

if __name__ == "__main__":
    cli_evaluate()

"""What ``tp_mamba`` exports exists, and is imported only when asked for."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import tp_mamba


def test_every_exported_name_is_what_its_module_defines() -> None:
    assert set(tp_mamba.__all__) == set(tp_mamba._MODULES)
    for name in tp_mamba.__all__:
        assert getattr(tp_mamba, name).__name__ == name
        assert name in dir(tp_mamba)
    with pytest.raises(AttributeError, match="has no attribute 'Mamba2'"):
        _ = tp_mamba.Mamba2


def test_the_version_is_that_of_the_installed_package() -> None:
    assert tp_mamba.__version__ == version("tp-mamba")
    assert "__version__" in dir(tp_mamba)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, tp_mamba; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_a_model_that_is_loaded_imports_no_compiler() -> None:
    """Neither torch's nor Triton: together they take longer than all the rest of a command's start."""
    code = """if True:
        import sys
        import torch
        from tp_mamba.config import MambaConfig
        from tp_mamba.model import MambaForCausalLM
        from tp_mamba.models.activations import activation_bytes_per_token
        sizes = {"model_type": "mamba", "hidden_size": 4, "num_hidden_layers": 1, "vocab_size": 9}
        model = MambaForCausalLM(MambaConfig.from_dict(sizes))
        model(torch.arange(3)[None])
        assert activation_bytes_per_token(model.config, 1, torch.float32)
        assert activation_bytes_per_token(model.config, 2, torch.float32)
        sys.exit(bool({"torch._dynamo", "triton"} & set(sys.modules)))
    """
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0

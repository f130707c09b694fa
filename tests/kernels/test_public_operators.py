"""No module calls what torch keeps for itself: such names change without notice, and Inductor refuses the operators."""

import re
from pathlib import Path

import tp_mamba
import tp_mamba.kernels
import tp_mamba.launch

_PRIVATE = re.compile(r"torch\._C\b|torch\.ops\.(?!tp_mamba\b|aten\b)\w+|torch\.ops\.\w+\._\w+|\b_VF\b")


def test_only_public_operators_are_called() -> None:
    roots = {Path(str(package.__file__)).parent for package in (tp_mamba, tp_mamba.kernels, tp_mamba.launch)}
    files = {file for root in roots for file in root.rglob("*.py")}
    assert len(files) > 50
    assert [f"{file}: {found[0]}" for file in files for found in _PRIVATE.finditer(file.read_text())] == []
    for private in ("torch._C._nn.linear", "torch.ops.mkldnn._linear_pointwise", "torch.ops.aten._softmax"):
        assert _PRIVATE.search(private)

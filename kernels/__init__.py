"""The mathematics of Mamba-1 on one device: tensors in, tensors out.

Import from the modules, for example ``from tp_mamba.kernels.selective_scan import selective_scan_fn``.
This file stays empty of code on purpose: in a checkout the folder can be imported under the bare name
``kernels`` as well, and anything run here would then run twice.
"""

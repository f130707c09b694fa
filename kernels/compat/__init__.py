"""Functions with the signatures of vLLM, mamba_ssm and causal-conv1d, for callers written for those; one module each.

Nothing else in this project imports them. docs/call-forms.md lists what they take and what they refuse.
"""

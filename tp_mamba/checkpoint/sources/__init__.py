"""The layouts that weights are published in, behind one interface."""

"""Prune a pretrained transformer into a family of models out of shared, once-tuned parts."""

__version__ = "0.1.0"

"""Quantize, prune, distill, export and judge causal language models, one decoder block at a time."""

__version__ = "0.1.0"

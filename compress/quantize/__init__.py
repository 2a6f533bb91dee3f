"""Quantization methods (pure, one file each) and the loop that drives them."""

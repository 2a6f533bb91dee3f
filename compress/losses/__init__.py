"""Losses between two models' predictions that never hold all logits; see `in_blocks` and `at_once`."""

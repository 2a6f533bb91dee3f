"""Evaluators: metrics, statistics and the accuracy gate."""

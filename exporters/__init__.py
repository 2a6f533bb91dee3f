"""Exporters: from a compressed folder to what a device runs."""

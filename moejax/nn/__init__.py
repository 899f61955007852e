"""Linen modules: they hold parameters and call pure functions."""

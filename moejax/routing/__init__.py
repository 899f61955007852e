"""Routing as pure functions: which experts a token goes to, with which weights, at what loss."""

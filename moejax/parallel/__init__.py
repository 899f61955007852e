"""Meshes, sharding rules, and code that runs once per device."""

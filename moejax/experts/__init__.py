"""How chosen experts are run: layouts, dispatches and kinds of expert, as pure functions."""

"""The command line: one file per command, each with ``run(argv) -> exit code``."""

"""Makes data sets from public packages: what ``moejax prepare NAME`` runs."""

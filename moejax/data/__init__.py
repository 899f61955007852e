"""Records, sources and batches; never imports models."""

"""FLOPs and parameter accounting."""

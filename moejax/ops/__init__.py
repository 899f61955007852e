"""Pure array functions, no flax."""

"""FLOP-matched comparison: the plan, the statistics, the tables and the pictures."""

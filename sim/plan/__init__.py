"""Which configuration, and how many of it: searches over simulations."""

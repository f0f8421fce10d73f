"""The engine, its executors and the edges as processes of their own, and their supervision."""

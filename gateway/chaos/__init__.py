"""`octavo chaos`: breaks a running server on purpose, and reports what its clients saw of it."""

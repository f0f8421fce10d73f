"""`octavo bench gpu`: what one GPU could do, and what this engine and others get of it."""

"""One folder per actor: core.py decides, actor.py carries; runtime/ holds the runtimes."""

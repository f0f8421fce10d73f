"""What `octavo sim` does: runs, plans, replays and calibrates the simulator from the command line."""

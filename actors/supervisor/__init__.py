"""The supervisor: who is alive, epochs, restart budgets."""

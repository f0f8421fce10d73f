"""How long a step takes: closed form, measured tables, or a fit to our own engine."""

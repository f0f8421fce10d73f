"""Fault injection: the production actors under virtual time, with one seed for everything that can go wrong."""

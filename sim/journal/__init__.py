"""Journals of live engines: read, replayed, explained and compared."""

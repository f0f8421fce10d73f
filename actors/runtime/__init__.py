"""Runtimes: mailboxes and clocks that carry messages between actors."""

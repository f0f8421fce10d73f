"""Other engines, each behind a small adapter in a process of its own, for `octavo bench offline --peers`."""

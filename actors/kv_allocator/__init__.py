"""The KV allocator: which block belongs to which request."""

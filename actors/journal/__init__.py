"""The journal: what scheduler and KV allocator heard, so that every decision can be made again."""

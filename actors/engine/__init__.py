"""The engine process: scheduler and KV allocator on one event loop, everybody else behind a port."""

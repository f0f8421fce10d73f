"""The OpenAI-compatible server: routes, bodies, streams and their journal, admission, metrics."""

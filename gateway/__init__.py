"""HTTP, streaming, command line, embedding."""

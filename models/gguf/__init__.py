"""GGUF files: reading them, and what their metadata says of configuration, tokenizer and tensors."""

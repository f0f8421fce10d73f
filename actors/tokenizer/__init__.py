"""The tokenizer: text and conversations to token ids."""

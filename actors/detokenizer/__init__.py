"""The detokenizer: token ids to text, stop strings."""

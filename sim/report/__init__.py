"""What a person looks at: one self-contained page of plots and tables."""

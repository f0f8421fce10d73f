"""What arrives when: traces, synthetic loads, and transforms of both."""

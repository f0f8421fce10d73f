"""Virtual time, workloads, step-time models."""

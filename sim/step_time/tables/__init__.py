"""Measured tables of other projects, read as step-time models."""

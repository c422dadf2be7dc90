"""Runs in a browser on this machine, and conversations with their models."""

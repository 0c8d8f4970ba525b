"""Tuning a model on examples: instructions with responses, texts with labels, and preferences."""

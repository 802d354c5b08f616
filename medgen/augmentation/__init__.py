"""Synthetic records for training classifiers: planned from a target distribution, generated through gates, mixed, and measured."""

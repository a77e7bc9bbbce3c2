"""Scoring choices by log-likelihood, metrics with their errors, and paired statistics."""

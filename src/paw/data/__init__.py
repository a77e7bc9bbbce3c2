"""Data sets as typed examples, whatever they come from, and examples as tokens."""

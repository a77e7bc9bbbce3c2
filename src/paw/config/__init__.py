"""The schemas of the groups that every task has, and how schemas check values; nothing heavy."""

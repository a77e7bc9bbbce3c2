"""The schema of every group in conf/, and the composition of a command line into it. Imports nothing heavy."""

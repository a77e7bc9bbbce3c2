"""What is done with a task's graph: checked, planned, or run and reported."""

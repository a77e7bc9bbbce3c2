"""Many jobs of one command: what their folder holds, and the page that answers for all of them."""

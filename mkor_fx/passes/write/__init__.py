"""What is written into a graph, one pass a file, and the drafts that they fill in."""

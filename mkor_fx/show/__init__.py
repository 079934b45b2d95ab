"""What was done, to look at: recordings below the passes, viewers above them."""

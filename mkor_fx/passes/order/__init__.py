"""In which order things happen, and what crosses the network together."""

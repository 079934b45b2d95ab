"""From a captured graph to a program, one stage a file; ``pipeline.py`` is the literal order."""

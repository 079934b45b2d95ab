"""From a captured graph to a program, one stage a folder; ``pipeline.py`` is the literal order."""

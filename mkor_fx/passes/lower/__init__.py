"""From semantic operators to aten."""

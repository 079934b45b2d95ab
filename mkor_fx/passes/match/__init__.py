"""From a gradient back to its weight's products: sites, their layouts and their rules."""

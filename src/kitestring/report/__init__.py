"""What a comparison's figures mean: costs, limits, a decision, a table, a page."""

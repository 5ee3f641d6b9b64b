"""Numbers that the published networks gave, to hold ours against; see `recipe` for the weights."""

"""Which channels, neurons and heads of a model can only be removed together."""

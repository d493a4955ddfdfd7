"""Where replies are computed. An engine runs any collaboration and knows none by name."""

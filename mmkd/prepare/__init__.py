"""What the shipped recipes and suites need and no hub gives: small models and data, made from packages."""

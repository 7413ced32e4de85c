"""The reward that learns: frozen features, the discriminator on them, when and on what it trains."""

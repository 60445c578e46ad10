"""From folders of pairs to a network that registers."""

"""The commands of medattn: they read configs and wire data, networks, training and reports together."""

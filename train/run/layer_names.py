"""The names of layers in a recipe: a module of the network, or several that are read together, `blocks.3+blocks.4`."""

JOIN = "+"


def modules_of(layer: str) -> list[str]:
    """The modules whose features a layer has: one, or those that `+` joins."""
    return layer.split(JOIN)

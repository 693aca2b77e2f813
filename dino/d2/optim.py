"""Functions that recipes name."""


def tenth_for_backbone(name: str) -> float:
    """Factor of the learning rate for the parameter `name`: the backbone itself learns at a tenth, as published."""
    return 0.1 if ".backbone." in name else 1.0

"""One module a layout: how its tensors are named and laid out."""

"""What to keep for a number of bytes: choices of a layer, and the best mix of them."""

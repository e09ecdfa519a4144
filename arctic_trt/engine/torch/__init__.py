"""The portable engine: a rank's weights packed the way the torch runtime multiplies them."""

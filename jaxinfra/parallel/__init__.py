"""Where arrays live: the device mesh, the declaration of parameters, and the rules that place them."""

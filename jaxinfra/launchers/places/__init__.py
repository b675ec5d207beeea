"""Takes a run to the machines where it is to train: hosts that exist, or those of a cloud."""

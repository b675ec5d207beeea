"""What a model is trained for: the batch it needs and the loss it is judged by."""

"""Training over time: the loop, its clock, evaluation, derived numbers and sampling."""

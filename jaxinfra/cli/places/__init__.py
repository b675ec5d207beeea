"""Commands for runs at other places."""

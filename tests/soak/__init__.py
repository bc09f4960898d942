"""Training that is killed again and again, and must end with the weights of an undisturbed run. See `__main__.py`."""

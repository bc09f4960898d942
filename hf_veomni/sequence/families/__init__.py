"""What single model families need: a file for each kind."""

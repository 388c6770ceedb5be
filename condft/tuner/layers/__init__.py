"""What a wrapped module is made of: copies of its weights that act and train, one kind a file."""

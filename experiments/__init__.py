"""What is run: the command line and one module per command."""

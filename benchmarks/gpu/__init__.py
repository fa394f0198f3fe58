"""What selection costs on one GPU."""

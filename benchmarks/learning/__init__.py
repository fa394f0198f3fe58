"""What selection buys: samples and seconds until a loss is reached."""

"""What is done to parameters and modules."""

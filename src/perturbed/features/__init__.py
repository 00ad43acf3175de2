"""What is done to hidden states and attention."""

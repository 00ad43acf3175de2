"""What is done while predicting."""

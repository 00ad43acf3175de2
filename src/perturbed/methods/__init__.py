"""One file per paper: card, study and the composition."""

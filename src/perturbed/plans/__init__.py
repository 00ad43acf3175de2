"""Built-in control plans: real data, small models of real classes, losses and measures."""

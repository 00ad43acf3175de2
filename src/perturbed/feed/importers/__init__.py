"""What others say of papers, read: saved pages, the hub's JSON, arXiv's Atom, OAI-PMH, RSS; from files or the net."""

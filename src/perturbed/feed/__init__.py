"""The daily-papers feed: import, search, browse, subscribe, and see what was measured of each paper. Never torch."""

"""The pages of the feed: what a visitor reads and what the owner does, over HTTP on loopback or behind a proxy."""

"""Offline: turns images of any source into tar shards with an index, and checks them."""

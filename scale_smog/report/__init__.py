"""A run as one page: `report.html`, which opens from disk without a network."""

"""Datasets in object stores: what the plan will read is on the local disk by then."""

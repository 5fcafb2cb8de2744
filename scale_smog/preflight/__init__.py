"""Checks of hosts, network, dataset and memory before a run begins."""

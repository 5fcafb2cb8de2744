"""Checks of hosts, network, dataset and memory before a run begins."""

from scale_smog.preflight.checks import check, require_equal_hosts

__all__ = ["check", "require_equal_hosts"]

"""What may be wrong with a cluster, found before a run begins."""

from scale_smog.preflight.program import check, require_equal_hosts

__all__ = ["check", "require_equal_hosts"]

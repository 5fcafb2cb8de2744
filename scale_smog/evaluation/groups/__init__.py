"""How pure the groups are, and pictures of them (SMoG Figure 5)."""

"""What a run says of itself: metrics, health, its folder, curves and the final table."""

"""What keeps a run safe: phases, preemption, watchdog, logs of ranks, retries, durable files."""

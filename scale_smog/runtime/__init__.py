"""What keeps a rank alive and heard: phases, signals, deadlines, logs, retries, durable files."""

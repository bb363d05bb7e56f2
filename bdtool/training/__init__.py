"""Training: base networks, the policy network (curriculum), and both together (fine-tuning)."""

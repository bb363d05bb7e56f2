"""What of bdtool works on this machine, and the command that adds what does not."""

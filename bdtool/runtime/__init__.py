"""Running a network block by block: preprocessing, policies, controllers, strategies and the orchestrator."""

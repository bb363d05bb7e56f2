"""A bundle gains another precision: statistics along the paths, candidates on trial, gates, the choice of `mixed`."""

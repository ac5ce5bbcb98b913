"""What a run does at every token: pure functions of the token clock, free of torch."""

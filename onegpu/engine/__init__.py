"""Generation: what comes between a prompt and its answer."""

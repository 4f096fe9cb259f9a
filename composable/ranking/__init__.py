"""What matters in a whole model, measured once; scores and a wanted size to a configuration."""

"""Every (module, rate) variant: made, refitted, trained, and put together into a model."""

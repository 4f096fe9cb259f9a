"""The Python interface: models and variants as objects, nothing through files."""

"""A model as a whole: fetch, read, cut, count, write, export."""

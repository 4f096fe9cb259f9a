"""Whole models learn: transformers.Trainer, callbacks, healing."""

"""The files between the scripts: configurations, bundle, calibration, scores, stats."""

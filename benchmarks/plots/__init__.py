"""The plots of the measurements."""

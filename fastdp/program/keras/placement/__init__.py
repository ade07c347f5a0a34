"""A replica that spans several devices."""

"""Keeps the copies of a module on other devices what the user's module is at each step."""

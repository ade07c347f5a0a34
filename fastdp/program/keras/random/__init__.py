"""Random draws by global row."""

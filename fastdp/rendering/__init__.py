"""Renders paragraphs and tables as plain text, in a terminal by rich, and as HTML."""

"""The built-in models as torch modules; imported where torch is used."""

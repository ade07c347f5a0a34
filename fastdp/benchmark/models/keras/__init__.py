"""The built-in models as Keras models, on any backend; imported where Keras is used."""

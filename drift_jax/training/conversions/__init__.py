"""Published names and layouts of weights into ours, one module a model."""

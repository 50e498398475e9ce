"""The mathematics of the methods: tensors in, tensors out, no models, files or Lightning."""

"""Code that the methods share: the pipeline's parts, the edited weights, pictures, work over processes."""

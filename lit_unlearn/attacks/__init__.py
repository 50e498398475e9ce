"""White-box attacks on an edited model: what of a concept it can still be made to draw."""

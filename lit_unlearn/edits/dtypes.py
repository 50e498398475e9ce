"""Types of exported weights, apart from all that takes seconds to import."""

DTYPES = ("float32", "bfloat16", "float16")

"""SGLang Runtime."""

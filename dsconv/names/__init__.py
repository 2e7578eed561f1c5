"""The tensor names and layouts of other frameworks, as Hugging Face's, and back: one table a family."""

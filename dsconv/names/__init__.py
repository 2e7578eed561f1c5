"""Convert the tensor names and layouts of other frameworks to Hugging Face's and back, by one table per family."""

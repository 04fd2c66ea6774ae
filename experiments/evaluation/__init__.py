"""`acodm evaluate`: perplexity by domain, and the field's downstream tasks."""

"""What a trained model can do: perplexity by domain, and the field's downstream tasks."""

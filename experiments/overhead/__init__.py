"""`acodm overhead`: what measuring costs a training step."""

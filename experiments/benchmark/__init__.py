"""`acodm benchmark`: mixers × seeds × schedules as jobs that are run once."""

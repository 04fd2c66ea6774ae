"""Text from files, the hub or this installation, into token stores."""
